"""Where the time of training steps goes, by torch's profiler: `benchmarks.sweep --profile`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.measure import on_gpu
from benchmarks.throughput import prepared, turn
from train import TrainConfig


def trace(config: TrainConfig, folder: Path) -> str:
    """Profile three steps with the loader into trace-BATCH-RANK.json for Chrome, and print what took longest."""
    with prepared(config) as bench:
        cuda = bench.accelerator.device.type == "cuda"
        turn(bench.step_together, 2, cuda)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with torch.profiler.profile(activities=activities) as profile:
            turn(bench.step_together, 3, cuda)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"trace-{config.batch_size}-{bench.accelerator.process_index}.json"
        profile.export_chrome_trace(str(path))
        if bench.accelerator.is_main_process:
            print(longest(profile, cuda))
            if cuda:
                spans = [(event.time_range.start, event.time_range.end) for event in on_gpu(profile.events())]
                print(f"no kernel runs for {100 * gaps(spans):.1f} % of the time between the first and the last")
            print(f"trace: {path}", flush=True)
        return str(path)


def longest(profile: Any, cuda: bool, count: int = 10) -> str:
    """A table of the kernels, on a CPU the operators, that took longest by themselves."""
    averages = on_gpu(profile.key_averages()) if cuda else profile.key_averages()
    own_us = [(getattr(average, f"self_{'device' if cuda else 'cpu'}_time_total"), average) for average in averages]
    total = sum(us for us, _ in own_us) or 1
    lines = [f"{'ms':>10} {'share':>7} {'calls':>7}  {'kernel' if cuda else 'operator'}"]
    for us, average in sorted(own_us, key=lambda item: -item[0])[:count]:
        lines.append(f"{us / 1e3:10.2f} {100 * us / total:6.1f}% {average.count:>7}  {average.key[:90]}")
    return "\n".join(lines)


def gaps(spans: Iterable[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no span covers.

    >>> gaps([(0, 2), (1, 4), (6, 10)])
    0.2
    """
    ordered = sorted(spans)
    if not ordered:
        return 0.0
    ends = list(itertools.accumulate((end for _, end in ordered), max))
    idle = sum(max(0.0, start - end) for end, (start, _) in zip(ends, ordered[1:], strict=False))
    return idle / (ends[-1] - ordered[0][0])
