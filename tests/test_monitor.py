"""What is watched while training runs is what its definitions say, and training does not notice."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model import monitor
from model.checkpoint import latest
from model.monitor import OnlineProbe, contrast
from model.step import Outcome, train_step
from pipeline.shards import Sample
from pipeline.write import write_shards
from tests.oracles import monitor as oracle
from tests.test_train import _handlers, png, rows, run, shards  # noqa: F401

CONTRAST = ["contrast_accuracy", "contrast_entropy", "alignment", "uniformity"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measured(first: Tensor, second: Tensor, temperature: float) -> dict[str, float]:
    return {name: float(value) for name, value in contrast(first, second, temperature).items()}


# ---- the contrast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize(("n", "others", "noise"), [(2, 0, 0.1), (17, 0, 0.5), (64, 0, 1.0), (16, 33, 0.7)])
def test_the_contrast_is_that_of_the_definitions(n: int, others: int, noise: float, temperature: float) -> None:
    """For rows of any length, and with second views of images whose first view is not here."""
    first = draw(n, 24) * draw(n, 1, seed=1).exp()
    second = torch.cat([first + noise * first.norm(dim=1, keepdim=True) * draw(n, 24, seed=2) / 5, draw(others, 24)])
    expected = oracle.contrast(first.double().numpy(), second.double().numpy(), temperature)
    assert measured(first, second, temperature) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_collapse_and_perfection_read_as_such() -> None:
    """All rows equal: nothing is told apart. Every image alone on an axis of its own: all are."""
    collapsed = measured(torch.ones(8, 4), torch.ones(8, 4), 0.1)
    assert collapsed == pytest.approx(dict(zip(CONTRAST, [1 / 8, math.log(8), 0.0, 0.0], strict=True)), abs=1e-6)
    perfect = measured(torch.eye(8), 3 * torch.eye(8), 0.01)
    assert perfect == pytest.approx(dict(zip(CONTRAST, [1.0, 0.0, 0.0, -4.0], strict=True)), abs=1e-6)


def test_large_batches_are_judged_by_their_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against all second views still; and at least one row, however many those are."""
    first, second = draw(40, 8), draw(60, 8, seed=1)
    for most, taken in ((60 * 7 + 59, 7), (1, 1)):
        monkeypatch.setattr(monitor, "MAX_SIMILARITIES", most)
        assert measured(first, second, 0.2) == measured(first[:taken], second, 0.2)


# ---- the probe -----------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """An encoder whose output is its input."""

    num_features = 6

    def forward(self, features: Tensor) -> Tensor:
        return features


def labelled(seed: int, images: int = 10) -> tuple[Tensor, Tensor]:
    """Features (2m, 6) of three classes, which an offset tells apart and another one hides, and labels (m,)."""
    labels = torch.randint(3, (images,), generator=torch.Generator().manual_seed(seed))
    offset = torch.eye(3, 6)[labels].repeat(2, 1)
    return 100 + 5 * offset + draw(2 * images, 6, seed=seed), labels


def probe_of_three() -> tuple[nn.Module, OnlineProbe]:
    encoder = Features()
    return encoder, OnlineProbe(encoder, 3, "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_probe_is_softmax_regression_on_standardised_features(share: float) -> None:
    """Step for step to a float64 oracle, from the first; a quarter of a batch makes a quarter of the step."""
    encoder, probe = probe_of_three()
    weight, bias = np.zeros((3, 6)), np.zeros(3)
    for step in range(5):
        features, labels = labelled(step)
        encoder(features)
        probe.learn(labels, share)
        weight, bias, accuracy = oracle.probe_step(
            weight, bias, features.double().numpy(), labels.numpy(), share * monitor.PROBE_LR / 6
        )
        np.testing.assert_allclose(probe.linear.weight.numpy(), weight, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(probe.linear.bias.numpy(), bias, rtol=1e-4, atol=1e-5)
        assert float(probe.accuracy()) == pytest.approx(accuracy)


def test_the_probe_learns_what_can_be_told_apart_and_nothing_else() -> None:
    accuracies = []
    for shuffled in (False, True):
        encoder, probe = probe_of_three()
        for step in range(300):
            features, labels = labelled(step, images=100)
            encoder(features)
            probe.learn(labels.roll(1) if shuffled else labels, 1.0)
        accuracies.append(float(probe.accuracy()))
    assert accuracies[0] > 0.98
    assert accuracies[1] < 0.5


def test_features_that_are_not_finite_teach_nothing() -> None:
    """A broken image leaves the weights as they are, and a broken feature those of its own column."""
    encoder, probe = probe_of_three()
    for step, factor in enumerate([1.0, torch.nan, torch.inf, 3e38]):
        features, labels = labelled(step)
        encoder(factor * features)
        probe.learn(labels, 1.0)
        if step == 0:
            learnt = probe.linear.weight.clone()
        assert torch.equal(probe.linear.weight, learnt)
    assert probe.linear.bias.isfinite().all()
    features, labels = labelled(0)
    features[0, 2] = torch.nan
    encoder(features)
    probe.learn(labels, 1.0)
    same = (probe.linear.weight == learnt).all(0)
    assert same.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_refused(label: int) -> None:
    """On a GPU the kernel would take the whole process with it."""
    encoder, probe = probe_of_three()
    encoder(draw(4, 6))
    with pytest.raises(ValueError, match=f"{label}.*expected 0 to 2"):
        probe.learn(torch.tensor([0, label]), 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    encoder = Features()
    probe = OnlineProbe(encoder, 3, "cuda")  # type: ignore[arg-type]
    features, labels = labelled(0)
    features = features.cuda()
    try:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        encoder(features)
        probe.learn(labels, 1.0)
        values = contrast(*features.chunk(2), 0.1) | {"probe_accuracy": probe.accuracy()}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 <= float(values.pop("probe_accuracy")) <= 1
    on_cpu = contrast(*features.cpu().chunk(2), 0.1)
    for name, value in values.items():
        torch.testing.assert_close(value.cpu(), on_cpu[name], rtol=1e-3, atol=1e-3)


# ---- in a run ------------------------------------------------------------------------------------------------------


def checkpointed(out: Path) -> dict[str, str]:
    newest = latest(out / "checkpoints")
    assert newest is not None
    return json.loads((newest / "state.json").read_text())["sha256"]


def test_training_does_not_notice_the_probe(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    """Losses, contrast, weights, momentum and the exported file are bitwise those of a run without it."""
    found = []
    for option in ("--online-probe", "--no-online-probe"):
        out = tmp_path / option
        common = ("--data", str(shards), "--out", str(out), "--steps", "5", "--micro-batch", "4", "--log-every", "2")
        done = run(*common, option)
        assert done.exit_code == 0, done.output
        found.append((rows(out), checkpointed(out), (out / "encoder/encoder.safetensors").read_bytes()))
    (rows_on, hashes_on, encoder_on), (rows_off, hashes_off, encoder_off) = found
    assert [row.pop("probe_accuracy", None) is not None for row in rows_on] == [False, True, False, True, True]
    assert rows_on == rows_off
    assert hashes_on.pop("probe.safetensors")
    assert hashes_on == hashes_off
    assert encoder_on == encoder_off


def test_a_probe_may_begin_where_a_run_goes_on(
    shards: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run without one that was cut short gets it with --resume, and is told so; one in a checkpoint goes on."""
    common = ("--data", str(shards), "--out", str(tmp_path), "--steps", "6", "--checkpoint-every", "2", "--log-every")
    for option, resumed_at in (("--no-online-probe", 0), ("--online-probe", 2), ("--online-probe", 4)):
        taken = iter(range(2))

        def cut(*given: Any, real: Any = train_step, taken: Any = taken, **options: Any) -> Outcome:
            if next(taken, None) is None:
                raise OSError("the plug was pulled")
            return real(*given, **options)

        with monkeypatch.context() as patch:
            patch.setattr("model.step.train_step", cut)
            done = run(*common, "1", "--resume", option)
        assert f"step {resumed_at} of 6" in done.output
        assert ("from nothing: the checkpoint has none" in done.output) == (resumed_at == 2), done.output
        assert ("probe.safetensors" in checkpointed(tmp_path)) == (resumed_at > 0)
    assert ["probe_accuracy" in row for row in rows(tmp_path)] == [False] * 2 + [True] * 4


def test_without_labels_there_is_no_probe(tmp_path: Path) -> None:
    data, out = tmp_path / "flat", tmp_path / "run"
    write_shards([Sample(f"{i}.png", None, png(i)) for i in range(20)], data, classes=None)
    done = run("--data", str(data), "--out", str(out), "--steps", "1")
    assert done.exit_code == 0, done.output
    assert "probe      none without labels" in done.output
    assert rows(out)[0].keys() == {"step", "loss", "lr", *CONTRAST}
    assert "probe.safetensors" not in checkpointed(out)
