"""A run's progress: rows of metrics.jsonl and speed.jsonl, numbers for a tracker, and printed lines."""

import math
import resource
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from model.monitor import OnlineProbe, contrast
from model.run_folder import Log
from model.step import Outcome


class Report:
    """Collects the outcomes of steps on their device. Only `write` makes the host wait for it."""

    def __init__(
        self,
        log: Log,
        probe: OnlineProbe | None,
        *,
        device: torch.device,
        batch_size: int,
        total_steps: int,
        temperature: float,
        max_skipped: int,
        skipped: int,
        gather: Callable[[Tensor], Tensor],
        say: Callable[[str], None],
        track: Callable[[dict[str, Any], int], None] | None,
    ) -> None:
        """
        batch_size   images per step over all processes
        temperature  of the loss, for `contrast`
        max_skipped  steps in a row whose gradient was not finite that end the run
        skipped      such steps in a row up to now
        gather       rows of each process -> rows of all, on the device, the main process's first
        say          prints a line, on the main process alone
        track        takes numbers and their step, if a tracker is wanted
        """
        self.log, self.probe, self.device = log, probe, device
        self.batch_size, self.total_steps, self.temperature = batch_size, total_steps, temperature
        self.max_skipped, self.skipped = max_skipped, skipped
        self.gather, self.say, self.track = gather, say, track
        self._pending: list[tuple[int, Outcome, float]] = []
        self._clock_step = log.step
        self.start_clock()

    def start_clock(self) -> None:
        """Training continues now: evaluation and saving before it do not count."""
        self._since = time.perf_counter()

    def add(self, step: int, outcome: Outcome, lr: float) -> None:
        self._pending.append((step, outcome, lr))

    def write(self, wait_s: float, z: Tensor | None = None) -> None:
        """Rows and a line for the steps since the last call; with z (2n, D) of the last one, its contrast too.

        wait_s: seconds spent waiting for batches. Raises FloatingPointError after too many skipped steps in a row.
        """
        numbers = {} if z is None else self._contrast(z)
        rows, sources = self._rows()
        rows[-1] |= numbers
        self.log.metrics(rows)
        if broken := [row["step"] for row in rows if row.get("skipped", 0) >= self.max_skipped]:
            raise FloatingPointError(
                f"{self.max_skipped} steps in a row, up to step {broken[0]}, had a gradient that is not finite and "
                f"were skipped; z was not finite on {sources}. The weights and checkpoints are whole: look at the "
                "images of these steps, or lower --base-lr or raise --temperature and start anew"
            )
        last = rows[-1]
        speed = self._speed(last["step"], wait_s)
        self.log.speed(speed)
        self.say(self._line(last, speed, sum("skipped" in row for row in rows)))
        if self.track:
            self.track({"loss": last["loss"], "lr": last["lr"], **numbers, **speed}, last["step"])

    def accuracy(self, step: int, knn: float) -> None:
        """The kNN accuracy, 0 ... 1, of the encoder after `step`."""
        self.say(f"step {step}/{self.total_steps} | kNN accuracy {100 * knn:.2f} %")
        self.log.metrics([{"step": step, "knn": knn}])
        if self.track:
            self.track({"knn": knn}, step)

    def end(self, encoder: str) -> None:
        """Print where everything lies, and the kNN accuracy before and after training where both are known."""
        out, scores = self.log.out, self.log.knn()
        self.say(
            f"encoder      {encoder}\ncheckpoints  {out / 'checkpoints'}\nmetrics      {out / 'metrics.jsonl'}\n"
            f"views        {out / 'views.png'}"
        )
        if 0 in scores and self.total_steps in scores:
            self.say(
                f"kNN accuracy {100 * scores[0]:.2f} % at random initialisation, "
                f"{100 * scores[self.total_steps]:.2f} % after training"
            )

    def _rows(self) -> tuple[list[dict[str, Any]], str]:
        """A row for each step since the last call, and where z was not finite in any of them."""
        outcomes = torch.stack([torch.stack(outcome) for _, outcome, _ in self._pending])
        table = self.gather(outcomes[None]).cpu()  # (processes, steps, Outcome)
        losses, skips = table[..., 0].mean(0).tolist(), table[0, :, 1].tolist()
        rows: list[dict[str, Any]] = []
        for (step, _, lr), loss, skipped in zip(self._pending, losses, skips, strict=True):
            rows.append({"step": step, "loss": loss if math.isfinite(loss) else None, "lr": lr})
            self.skipped = self.skipped + 1 if skipped else 0
            if skipped:
                rows[-1]["skipped"] = self.skipped
        self._pending.clear()
        ranks = table[..., 2].any(1).nonzero().flatten().tolist()
        no_rank = "no rank, so the loss or its gradient overflowed"
        return rows, f"rank {', '.join(map(str, ranks))}" if ranks else no_rank

    def _contrast(self, z: Tensor) -> dict[str, float | None]:
        """The contrast of the main process's first views with all second views, and its probe's accuracy."""
        first, second = z.chunk(2)
        second = self.gather(second)
        if not self.log.main:
            return {}
        values = contrast(first, second, self.temperature)
        if self.probe:
            values["probe_accuracy"] = self.probe.accuracy()
        numbers = torch.stack(list(values.values())).tolist()
        return {name: x if math.isfinite(x) else None for name, x in zip(values, numbers, strict=True)}

    def _speed(self, step: int, wait_s: float) -> dict[str, Any]:
        """Rates since the last call or start of the clock."""
        now = time.perf_counter()
        seconds, steps = now - self._since, step - self._clock_step
        self._since, self._clock_step = now, step
        if self.device.type == "cuda":
            peak_mib = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return {
            "step": step,
            "images_per_s": round(steps * self.batch_size / seconds, 1),
            "step_ms": round(1000 * seconds / steps, 3),
            "data_wait_percent": round(100 * wait_s / seconds, 2),
            "peak_mib": round(peak_mib, 1),
        }

    def _line(self, row: Mapping[str, Any], speed: Mapping[str, Any], skips: int) -> str:
        step, loss, hits = row["step"], row["loss"], row.get("probe_accuracy")
        eta = timedelta(seconds=round((self.total_steps - step) * self.batch_size / speed["images_per_s"]))
        parts = [
            f"step {step}/{self.total_steps} {100 * step // self.total_steps}%",
            f"loss {math.nan if loss is None else loss:.3f}",
            f"damaged {len(self.log.replaced)}" if self.log.replaced else "",
            f"skipped {skips}" if skips else "",
            "" if hits is None else f"probe {100 * hits:.1f}%",
            f"img/s {speed['images_per_s']:.0f}",
            f"data_wait {speed['data_wait_percent']:.1f}%",
            f"mem {speed['peak_mib'] / 1024:.1f} GiB",
            f"lr {row['lr']:.3g}",
            f"eta {eta}",
        ]
        return " | ".join(part for part in parts if part)
