"""A training of two processes that is killed; `python -m tests.kills --kills 100` does so many more times."""

from pathlib import Path

from tests.processes import Program


def test_two_processes_killed_at_random_moments_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    """kill -9 of a rank and of the launcher: rows, checkpoint and encoder are bitwise those of a run left alone."""
    arguments = "--kills", "2", "--steps", "12", "--seed", "2"  # of rank 1, then of the launcher
    program = Program("-m tests.kills", *arguments, output=tmp_path / "output.txt")
    printed, _ = program.communicate(timeout=600)
    assert program.returncode == 0, printed
    assert "rank 1: 1, the launcher: 1" in printed
