"""Shared fixtures. Everything is made in memory or under tmp_path; nothing is downloaded."""

import gc
import os
from collections.abc import Iterator

import pytest

# One thread per process keeps float32 sums bitwise repeatable and leaves cores for multi-process tests.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
