"""The scaling model computes what its formulas say, refuses to guess, and agrees with processes that were measured."""

import csv
import math
import re

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import scaling
from benchmarks.measure import append
from benchmarks.scaling import Pieces, predict
from tests.timed import thrice

PIECES = Pieces(
    pass_images=10,
    forward_s=1.0,
    backward_s=2.0,
    optimizer_s=0.5,
    losses=((40, 0.1), (400, 10.0)),
    gradient_bytes=1000,
    row_bytes=16,
    latency_s=0.01,
    bandwidth=100.0,
    image_bytes=7.0,
)


def changed(**values):
    return Pieces(**{**vars(PIECES), **values})


def test_one_process_computes_and_talks_to_nobody():
    """40 images in four passes: 4 x 3 s, three forwards again, the loss at 80 rows, half a second of optimizer."""
    p = predict(PIECES, 40, 1)
    assert p.compute_s == pytest.approx(12.5)
    assert p.recompute_s == pytest.approx(3.0)
    assert p.loss_s == pytest.approx(0.4)  # (80 / 40)², as 400 / 40 rows took 10² times
    assert (p.gather_s, p.reduce_s, p.network_per_process) == (0, 0, 0)
    assert p.step_s == pytest.approx(15.9)
    assert p.images_per_s == pytest.approx(40 / 15.9)
    assert p.storage == pytest.approx(7 * 40 / 15.9)
    assert p.imagenet_hours == pytest.approx(100 * 32029 * 15.9 / 3600)
    assert p.limit == "compute"


def test_four_processes_add_what_a_ring_costs():
    """10 images each of 40: one pass; 80 rows of 20 bytes are gathered, 1000 bytes of gradients reduced."""
    p = predict(PIECES, 40, 4)
    assert (p.compute_s, p.recompute_s) == (pytest.approx(3.5), 0)
    assert p.loss_s == pytest.approx(0.1)  # 80 x 20 elements are 40 x 40
    assert p.gather_s == pytest.approx(6 * 0.01 + 3 / 4 * 80 * 20 / 100)
    assert p.reduce_s == pytest.approx(6 * 0.01 + 2 * 3 / 4 * 1000 / 100)
    assert p.step_s == pytest.approx(3.5 + 0.1 + 12.06 + 15.06)
    assert p.network_per_process == pytest.approx((1200 + 1500) / p.step_s)
    assert p.limit == "network"


def test_the_backward_hides_its_share_and_no_more():
    assert predict(changed(overlap=0.5), 40, 4).reduce_s == pytest.approx(15.06 - 0.5 * 2.0)
    assert predict(changed(overlap=1.0, bandwidth=1e9), 40, 4).reduce_s == 0
    # 20 images are two passes; only in the second do gradients travel
    assert predict(changed(overlap=1.0), 80, 4).reduce_s == pytest.approx(15.06 - 2.0)


def test_the_loss_grows_with_the_square_beyond_what_was_measured_and_not_below():
    assert predict(PIECES, 400, 1).loss_s == pytest.approx(10.0 * 4)
    assert predict(PIECES, 4, 1).loss_s == pytest.approx(0.1)


def test_a_slow_loader_sets_the_pace():
    p = predict(changed(loader_images_per_s=2.0), 40, 1)
    assert (p.step_s, p.images_per_s, p.limit) == (pytest.approx(20.0), pytest.approx(2.0), "loader")
    assert predict(changed(loader_images_per_s=1e3), 40, 1).limit == "compute"


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="40 does not divide among 3"):
        predict(PIECES, 40, 3)


# ---- from records

ENVIRONMENT = {"device": "Some GPU", "driver": "1.2", "threads": "4", "load": "0.1", "commit": "abc", "date": "today"}


def plant(records, **changes):
    """Steps of 32 and 64 images, eager and compiled; the loss at two sizes; the loader."""
    for images, mode, ms in ((32, "eager", 30), (64, "eager", 60), (64, "compile", 50), (128, "eager", 120)):
        row = {
            "depth": 50,
            "width": 1.0,
            "size": 224,
            "images": images,
            "world_size": 1,
            "layout": "nhwc",
            "mode": mode,
        }
        row |= {"precision": "bf16", "bn": "local", "median_ms": ms, "forward_ms": ms / 5, "loss_ms": 1}
        row |= {"backward_ms": ms / 2, "optimizer_ms": 2}
        append(records / "step.csv", [row | ENVIRONMENT | changes])
    for rows, ms in ((128, 1.0), (256, 4.0)):
        row = {"implementation": "triton", "mode": "forward+backward", "rows": rows, "median_ms": ms}
        append(records / "loss.csv", [row | ENVIRONMENT | changes])
    row = {"what": "loader", "implementation": "SwiftCLR", "size": 224, "images_per_s": 900}
    append(records / "loader.csv", [row | ENVIRONMENT | changes | {"threads": 16}])


def run(*arguments):
    app = typer.Typer()
    app.command()(scaling.main)
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done, " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.output).split())


def test_pieces_are_the_fastest_pass_that_fits(tmp_path):
    plant(tmp_path)
    found, source = scaling.recorded(tmp_path, "cuda", 50, 224, "bf16", 100)
    assert found["pass_images"] == 64
    assert (found["forward_s"], found["backward_s"]) == (pytest.approx(0.010), pytest.approx(0.025))
    assert found["losses"] == ((128, 0.001), (256, 0.004))
    assert found["loader_images_per_s"] == 900
    assert "Some GPU with 4 threads, passes of 64 images, compile, nhwc, commit abc" in source
    assert scaling.recorded(tmp_path, "cuda", 50, 224, "bf16", 8)[0]["pass_images"] == 32


def test_the_table_is_that_of_the_model_and_says_what_is_assumed(tmp_path):
    """Batch 128 on one: the pass of 128 images. The loader would take 142 ms, so it sets the pace."""
    plant(tmp_path)
    arguments = ["--records", tmp_path, "--batch-size", 128, "--processes", 1, "--plot-to", tmp_path / "scaling.png"]
    done, said = run(*arguments)
    assert done.exit_code == 0
    assert "predicted, not measured" in said
    line = next(line.split() for line in done.output.splitlines() if line.split()[:1] == ["1"])
    # compute 24 + 60 + 2, again, loss of 256 rows, gather, reduce, loader 128 / 900, step, images/s
    assert line[:9] == ["1", "86", "0", "4", "0", "0", "142.2", "142.2", "900"]
    assert line[-1] == "loader"
    assert "loader 900 images/s per process" in said
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_nothing_is_predicted_for_gpus_that_were_not_measured(tmp_path):
    """A CPU's record is no substitute; what the caller gives is, and is said to be given."""
    plant(tmp_path, driver="", device="Some CPU")
    done, said = run("--records", tmp_path)
    assert done.exit_code == 2
    assert "nothing is guessed" in said
    assert "images/s" not in said
    given = ["--step-ms", 95, "--step-images", 128, "--batch-size", 256]
    assert run("--records", tmp_path, *given)[0].exit_code == 2  # a step alone is not enough
    done, said = run("--records", tmp_path, *given, "--loss-ms", 1, "--loss-rows", 512, "--processes", 2)
    assert done.exit_code == 0
    assert "as given, not measured here" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--step-ms", 95], "together"),
        (["--overlap", 2], "0 to 1"),
        (["--batch-size", 128, "--processes", 3], "does not divide"),
    ],
)
def test_nonsense_is_refused(tmp_path, arguments, named):
    plant(tmp_path)
    done, said = run("--records", tmp_path, *arguments)
    assert done.exit_code == 2
    assert named in said


@pytest.mark.slow
@thrice
def test_two_processes_are_predicted_from_their_pieces(tmp_path):
    """The step of two that talk, from the steps of two that do not and the cost of an all-reduce.

    Within a factor 2 of the faster rounds: where a hypervisor runs others, each of the two waits for both.
    """
    scaling.measure_processes(2, images=4, width=1 / 16, rounds=15, record=tmp_path / "scaling.csv")
    with open(tmp_path / "scaling.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    pieces = scaling.pieces_of(row)
    assert (row["world_size"], row["images"], row["threads"], row["runs"]) == ("2", "4", "1", "15")
    assert pieces.gradient_bytes == scaling.gradient_bytes(18, 1 / 16, 32)
    assert 0 < pieces.latency_s < 1
    assert 0 < pieces.bandwidth < math.inf
    assert 0.5 < 1e3 * predict(pieces, 8, 2).step_s / float(row["p20_step_ms"]) < 2
