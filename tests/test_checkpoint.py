"""A checkpoint is whole or absent, restores bit for bit, and no file is believed."""

import json
import os
import resource
import shutil
import signal

import pytest
import torch
from torch import nn

from model import tensor_files
from model.checkpoint import (
    OWN_HASH,
    DamagedError,
    NotFiniteError,
    Saved,
    differences,
    latest,
    latest_whole,
    load,
    read_state,
    save,
    set_aside_newer,
)
from model.encoder import build_encoder
from model.lars import LARS, param_groups
from model.simclr import ProjectionHead, SimCLR

OPTIMIZERS = {
    "LARS": lambda groups: LARS(groups, lr=0.3),
    "LARS, lr tensor": lambda groups: LARS(groups, lr=torch.tensor(0.3)),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "SGD without momentum": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95)),
}


def build(kind="LARS", seed=0):
    torch.manual_seed(seed)
    encoder = build_encoder(18, width=1 / 16, stem="small")
    model = SimCLR(encoder, ProjectionHead(encoder.num_features, out_features=8)).to(memory_format=torch.channels_last)
    return model, OPTIMIZERS[kind](param_groups(model, 1e-4))


def train(model, optimizer, steps):
    for step in steps:
        views = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        z = nn.functional.normalize(model(views.to(memory_format=torch.channels_last)), dim=1)
        optimizer.zero_grad()
        (z[:4] * z[4:]).sum().neg().backward()
        optimizer.step()


def assert_same_training_state(a, b):
    """Weights, buffers, optimizer tensors and groups of two (model, optimizer) pairs are bitwise equal."""
    for (key, x), y in zip(a[0].state_dict().items(), b[0].state_dict().values(), strict=True):
        assert torch.equal(x, y), key
    x, y = a[1].state_dict(), b[1].state_dict()
    assert x["param_groups"] == y["param_groups"]
    assert x["state"].keys() == y["state"].keys()
    for i, entries in x["state"].items():
        assert entries.keys() == y["state"][i].keys()
        for key, value in entries.items():
            other = y["state"][i][key]
            assert type(value) is type(other)
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other), (i, key)
                assert value.dtype == other.dtype, (i, key)
                for form in (torch.contiguous_format, torch.channels_last)[: 1 + (value.ndim == 4)]:
                    assert value.is_contiguous(memory_format=form) == other.is_contiguous(memory_format=form), (i, key)
            else:
                assert value == other, (i, key)


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_restored_run_continues_bitwise(tmp_path, kind):
    """Three steps, save, three more; a fresh model and optimizer that load the file take the same three steps."""
    run = build(kind)
    train(*run, range(3))
    path = save(tmp_path, 3, model=run[0], optimizer=run[1], extra={"position": [1, 2], "note": "é"})
    assert path == tmp_path / "step-0000003" == latest(tmp_path)
    other = build(kind, seed=1)
    other[1].param_groups[0]["lr"] = 99.0  # belongs to the checkpoint, so it comes back
    assert load(path, model=other[0], optimizer=other[1]) == (3, {"position": [1, 2], "note": "é"})
    assert_same_training_state(run, other)
    conv = other[0].encoder.layer1[0].conv1.weight
    assert conv.is_contiguous(memory_format=torch.channels_last)
    train(*run, range(3, 6))
    train(*other, range(3, 6))
    assert_same_training_state(run, other)


def test_an_optimizer_before_its_first_step_is_restored_too(tmp_path):
    """No momentum yet; the run started from the checkpoint equals the run that went on."""
    run, other = build(), build(seed=1)
    load(save(tmp_path, 0, model=run[0], optimizer=run[1], extra={}), model=other[0], optimizer=other[1])
    train(*run, range(2))
    train(*other, range(2))
    assert_same_training_state(run, other)


def test_the_newest_are_kept_and_nothing_else_is_touched(tmp_path):
    """keep=2 of steps 5, 40, 300, 12345678; strangers in the folder stay; the order is the number's, not the name's."""
    model, optimizer = build()
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    for step in (5, 40, 300, 12345678):
        save(tmp_path, step, model=model, optimizer=optimizer, extra={}, keep=2)
    assert latest(tmp_path).name == "step-12345678"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "step-0000300",
        "step-12345678",
        "step-notes",
    ]


def test_going_back_to_an_earlier_step_keeps_what_it_saves(tmp_path):
    """With 10, 20 and 30 there and keep=1, a run resumed from 10 finds its step 15 where save said it is."""
    model, optimizer = build()
    for step in (10, 20, 30):
        save(tmp_path, step, model=model, optimizer=optimizer, extra={})
    assert save(tmp_path, 15, model=model, optimizer=optimizer, extra={}, keep=1).is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000015", "step-0000030"]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, 16, model=model, optimizer=optimizer, extra={}, keep=0)


def test_no_checkpoint_yet(tmp_path):
    """Neither a missing nor an empty folder has a latest; a step is saved once."""
    assert latest(tmp_path / "missing") is None
    assert latest(tmp_path) is None
    model, optimizer = build()
    save(tmp_path, 1, model=model, optimizer=optimizer, extra={})
    with pytest.raises(FileExistsError, match="step-0000001"):
        save(tmp_path, 1, model=model, optimizer=optimizer, extra={})


# ------------------------------------------------------------------------------------------------------------ faults

CALLS = [(os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (tensor_files, "save_file")]


def patch_calls(monkeypatch, action):
    """`action(call)` stands before and after each call through which writing reaches the disk."""
    for module, name in CALLS:
        real = getattr(module, name)

        def patched(*args, _real=real, _name=name, **kwargs):
            action(f"before {_name}")
            result = _real(*args, **kwargs)
            action(f"after {_name}")
            return result

        monkeypatch.setattr(module, name, patched)


def in_child(function):
    """Run in a forked process (threads of torch do not follow, so tensors must be small); returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def tiny(value):
    model = nn.Linear(8, 8)
    nn.init.constant_(model.weight, value)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def killed_at(monkeypatch, point, function, *args, **kwargs):
    """Run `function` in a child that gets SIGKILL at the point-th fault point; False if it ended before."""
    with monkeypatch.context() as patch:
        count = 0

        def action(_call):
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)

        patch_calls(patch, action)
        status = in_child(lambda: function(*args, **kwargs))
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def test_kill_anywhere_in_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """SIGKILL before and after every fsync, rename, write and removal: the old or the new checkpoint is whole."""
    old, new = tiny(1.0), tiny(2.0)
    seen = []
    for point in range(1, 1000):
        folder = tmp_path / str(point)
        save(folder, 1, model=old[0], optimizer=old[1], extra={"step": 1}, keep=1)
        killed = killed_at(
            monkeypatch, point, save, folder, 2, model=new[0], optimizer=new[1], extra={"step": 2}, keep=1
        )
        restored = tiny(0.0)
        step, extra = load(latest(folder), model=restored[0], optimizer=restored[1])
        assert extra == {"step": step}
        assert torch.equal(restored[0].weight, torch.full((8, 8), float(step)))
        seen.append(step)
        save(folder, 3, model=new[0], optimizer=new[1], extra={}, keep=1)
        assert [p.name for p in folder.iterdir()] == ["step-0000003"], "leftovers are cleaned by the next save"
        if not killed:
            break
    assert seen == sorted(seen), "once published, the new checkpoint stays"
    assert seen.count(1) > 10
    assert seen.count(2) > 3


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut must not leave a name without its bytes: flush files and folder, rename, flush the parent."""
    order = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(old, new):
        order.append(f"rename to {new.name}")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    model, optimizer = tiny(1.0)
    folder = tmp_path / "checkpoints"
    save(folder, 1, model=model, optimizer=optimizer, extra={})
    files = ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert order == [*files, "step-0000001", "rename to step-0000001", "checkpoints"]
    save(folder, 2, model=model, optimizer=optimizer, extra={}, keep=1)
    moved = len(order) - 1 - order[::-1].index("rename to step-0000001")
    assert moved > order.index("rename to step-0000002") + 1, "prune comes last"


def test_disk_full_leaves_the_old_checkpoint_and_no_part(tmp_path):
    """A file-size limit between state.json's and the weights' size: OSError, nothing published, nothing left."""
    model, optimizer = tiny(1.0)
    save(tmp_path, 1, model=model, optimizer=optimizer, extra={})
    big = nn.Linear(100, 100)

    def save_on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(OSError, match="model.safetensors"):
            save(tmp_path, 2, model=big, optimizer=torch.optim.SGD(big.parameters(), lr=0.1), extra={})

    assert os.waitstatus_to_exitcode(in_child(save_on_a_full_disk)) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000001"]
    load(latest(tmp_path), model=model, optimizer=optimizer)


@pytest.mark.parametrize("where", ["weight", "momentum", "running variance"])
def test_what_is_not_finite_is_not_saved(tmp_path, where):
    """One NaN or infinity anywhere: an error that names it, no new checkpoint, the old one kept."""
    model, optimizer = build("SGD")
    train(model, optimizer, range(2))
    save(tmp_path, 2, model=model, optimizer=optimizer, extra={})
    param = model.encoder.conv1.weight
    with torch.no_grad():
        if where == "weight":
            param[0, 0, 0, 0] = float("nan")
        elif where == "momentum":
            optimizer.state[param]["momentum_buffer"][0] = float("inf")
        else:
            model.encoder.bn1.running_var[0] = float("inf")
    name = "encoder.bn1.running_var" if where == "running variance" else "encoder.conv1.weight"
    with pytest.raises(NotFiniteError, match=name):
        save(tmp_path, 3, model=model, optimizer=optimizer, extra={})
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000002"]


def test_a_checkpoint_of_something_else_is_refused_untouched(tmp_path):
    """Other shapes, other keys, another optimizer, other groups: the message names both sides, nothing is changed."""
    model, optimizer = build()
    train(model, optimizer, range(1))
    path = save(tmp_path, 1, model=model, optimizer=optimizer, extra={})

    def refused(other, other_optimizer, *words):
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(ValueError) as error:  # noqa: PT011
            load(path, model=other, optimizer=other_optimizer)
        assert all(word in str(error.value) for word in words), error.value
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
        assert not other_optimizer.state

    encoder = build_encoder(18, width=1 / 32, stem="small")
    wide = SimCLR(encoder, ProjectionHead(encoder.num_features, out_features=8))
    refused(wide, LARS(param_groups(wide, 1e-4), 0.1), "encoder.conv1.weight", "(4, 3, 3, 3)", "(2, 3, 3, 3)")
    headless = SimCLR(build()[0].encoder, nn.Identity())
    refused(headless, LARS(param_groups(headless, 1e-4), 0.1), "head.0.weight", "unexpected")
    double = build()[0].double()
    refused(double, LARS(param_groups(double, 1e-4), 0.1), "float32", "float64")
    other = build(seed=1)[0]
    refused(other, torch.optim.SGD(param_groups(other, 1e-4), 0.1), "LARS in the checkpoint, SGD now")
    refused(other, LARS(other.parameters(), 0.1), "groups", "encoder.bn1.bias")


def test_damage_is_found_before_anything_is_loaded(tmp_path):
    """A flipped bit, a lost tail, another format version, a missing file."""
    model, optimizer = build("SGD")
    train(model, optimizer, range(1))
    path = save(tmp_path, 1, model=model, optimizer=optimizer, extra={})
    for name in ("model.safetensors", "optimizer.safetensors"):
        data = (path / name).read_bytes()
        flipped = bytearray(data)
        flipped[-3] ^= 4
        for damaged in (bytes(flipped), data[:-1], b""):
            (path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                load(path, model=model, optimizer=optimizer)
        (path / name).write_bytes(data)
    load(path, model=model, optimizer=optimizer)
    state = (path / "state.json").read_text()
    (path / "state.json").write_text(state.replace('"format": 1', '"format": 7'))
    with pytest.raises(ValueError, match="format 7, expected 1"):
        load(path, model=model, optimizer=optimizer)
    (path / "state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"state\.json"):
        load(path, model=model, optimizer=optimizer)


def flips(data, count=60):
    """The data with one bit of one byte changed, at places all over it."""
    for i in range(count):
        changed = bytearray(data)
        changed[i * (len(data) - 1) // (count - 1)] ^= 1 << i % 8
        yield bytes(changed)


def test_every_byte_of_a_checkpoint_is_covered_by_a_hash(tmp_path):
    """A changed bit anywhere, a lost end, no bytes, no file: each is found, by the name of its file."""
    model, optimizer = build("AdamW")
    train(model, optimizer, range(1))
    extra = {"config": {"base_lr": 0.3}, "note": "é"}
    path = save(tmp_path, 1, model=model, optimizer=optimizer, extra=extra, probe=nn.Linear(2, 2))
    for file in path.iterdir():
        data = file.read_bytes()
        for damaged in (*flips(data), data[:-1], data + b" ", data[: len(data) // 2], b""):
            file.write_bytes(damaged)
            with pytest.raises(DamagedError, match=file.name):
                read_state(path)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=file.name):
            read_state(path)
        file.write_bytes(data)
    assert read_state(path)["extra"] == extra


def test_a_checkpoint_is_of_the_step_that_its_name_says(tmp_path):
    """step-0000001 renamed to step-0000007 is refused; a copy under a name without a step is read."""
    model, optimizer = build()
    path = save(tmp_path, 1, model=model, optimizer=optimizer, extra={})
    shutil.copytree(path, tmp_path / "best")
    path = path.rename(tmp_path / "step-0000007")
    with pytest.raises(DamagedError, match=r"step-0000007/state\.json is of step 1, which is not that of its folder"):
        load(path, model=model, optimizer=optimizer)
    assert read_state(tmp_path / "best")["step"] == 1


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut off", "changed", "a folder"])
def test_the_newest_whole_checkpoint_is_found(tmp_path, name, how):
    """Damaged ones are passed over by name and set aside, so that their steps can be saved again; or none is left."""
    model, optimizer = tiny(1.0)
    for step in (1, 2, 3):
        save(tmp_path, step, model=model, optimizer=optimizer, extra={"lr": 0.25})
    assert latest_whole(tmp_path) == (tmp_path / "step-0000003", [])

    def damage(step):
        file = tmp_path / f"step-000000{step}" / name
        data = file.read_bytes()
        file.unlink()
        if how == "cut off":
            file.write_bytes(data[:-20])
        elif how == "changed":
            file.write_bytes(data.replace(b"0.25", b"0.75") if name == "state.json" else data[:-1] + b"7")
        elif how == "a folder":
            file.mkdir()

    damage(3)
    found, (fault,) = latest_whole(tmp_path)
    assert (found.name, f"step-0000003/{name}" in fault) == ("step-0000002", True)
    moved = f"a damaged checkpoint is now {tmp_path / 'damaged-step-0000003'}"
    assert set_aside_newer(Saved(found, read_state(found))) == [moved]
    save(tmp_path, 3, model=model, optimizer=optimizer, extra={"lr": 0.25})
    damage(3)
    assert set_aside_newer(Saved(found, read_state(found))) == [f"{moved}-2"]
    damage(2)
    assert latest_whole(tmp_path)[0].name == "step-0000001"
    damage(1)
    with pytest.raises(DamagedError, match="is whole: .*step-0000002.*; .*step-0000001"):
        latest_whole(tmp_path)
    assert latest_whole(tmp_path / "nothing") == (None, [])


def test_a_checkpoint_from_before_state_json_had_a_hash_is_read(tmp_path):
    """Its tensors are held to their hashes; a key that is almost the hash's is damage, not an old version."""
    model, optimizer = build()
    path = save(tmp_path, 1, model=model, optimizer=optimizer, extra={})
    file = path / "state.json"
    state = json.loads(file.read_text())
    digest = state.pop(OWN_HASH)
    file.write_text(json.dumps(state, indent=1))
    assert load(path, model=model, optimizer=optimizer) == (1, {})
    assert OWN_HASH not in read_state(path)
    file.write_text(json.dumps(state | {"sha256_of_the_bbove": digest}, indent=1))
    with pytest.raises(DamagedError, match="it has the key 'sha256_of_the_bbove'"):
        read_state(path)
    del state["sha256"]["model.safetensors"]
    file.write_text(json.dumps(state, indent=1))
    with pytest.raises(DamagedError, match="state.json is damaged: KeyError"):
        read_state(path)


def test_foreign_parameters_are_refused_at_save(tmp_path):
    """An optimizer of another model would be saved under names that do not exist."""
    with pytest.raises(ValueError, match="not the model's"):
        save(tmp_path, 1, model=nn.Linear(2, 2), optimizer=tiny(1.0)[1], extra={})


def test_differences_name_key_and_both_values():
    """Nested keys, absent keys and tuples; allowed keys and tables may differ."""
    saved = {
        "batch_size": 512,
        "views": {"size": 32, "preset": "cifar"},
        "steps": 10,
        "log": {"every": 1},
        "crop": [1, 2],
    }
    current = {"batch_size": 256, "views": {"size": 32}, "steps": 20, "log": {"every": 5}, "crop": (1, 2), "new": True}
    assert differences(saved, current, {"steps", "log"}) == [
        "batch_size: 512 in the checkpoint, 256 now",
        "new: nothing in the checkpoint, true now",
        'views.preset: "cifar" in the checkpoint, nothing now',
    ]
    assert differences(saved, saved) == []
    assert differences(saved, current, {"batch_size", "views.preset", "steps", "log.every", "new"}) == []


def test_nothing_is_saved_or_removed_through_a_link_nor_what_is_not_ours(tmp_path):
    """A folder of checkpoints that leads elsewhere is refused; what only has a checkpoint's name is not pruned."""
    model, optimizer = tiny(1.0)
    victim = tmp_path / "victim"
    kept = save(victim, 1, model=model, optimizer=optimizer, extra={})
    (tmp_path / "checkpoints").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link.*checkpoints"):
        save(tmp_path / "checkpoints", 2, model=model, optimizer=optimizer, extra={}, keep=1)
    assert list(victim.iterdir()) == [kept]
    folder = tmp_path / "mine"
    for name in ("step-0000001", ".tmp-step-0000002", ".checkpoint.abcdefgh.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "notes").write_text("mine")
    (folder / "step-0000002").symlink_to(kept)
    for step in (3, 4):
        save(folder, step, model=model, optimizer=optimizer, extra={}, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".checkpoint.abcdefgh.tmp",
        ".tmp-step-0000002",
        "step-0000001",
        "step-0000004",
    ]
    assert len(list(folder.rglob("notes"))) == 3
    assert read_state(kept)["step"] == 1
