"""Shared fixtures. Everything is made in memory or under tmp_path; nothing is downloaded."""

import gc
import os
from collections.abc import Iterator

import pytest

# Test files run beside each other, one process for each core. A few threads keep float32 sums bitwise repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep instead of taking the cores from others
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(optionalhook=True)  # for who leaves pytest-xdist out, as .ci/gpu.py does
def pytest_xdist_auto_num_workers() -> int:
    """The cores that this process may use: pytest-xdist would count all of the machine, and start as many for each."""
    return min(8, len(os.sched_getaffinity(0)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers each time: torch's own seed is another in every process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _gpu_memory_given_back() -> Iterator[None]:
    """What torch's cache keeps reserved, DALI and the next process cannot have."""
    yield
    import torch

    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
