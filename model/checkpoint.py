"""Checkpoints that survive kill -9.

    save(folder, step, model=..., optimizer=..., extra=...)       writes folder/step-0000123/, removes the oldest
    load(path, model=..., optimizer=...) -> (step, extra)         restores bit for bit
    latest_whole(folder)                                          the newest undamaged one

A checkpoint is a folder of model.safetensors, optimizer.safetensors, perhaps probe.safetensors, and state.json, which
holds everything that is not a tensor, the hashes of the other files and, as its last key, its own hash. The folder is
written under another name, flushed to the disk and then renamed: a checkpoint under its final name is complete. Later
damage shows in the hashes. Nothing in a file is used before it matches the model that it is loaded into.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model.tensor_files import DamagedError, first_not_finite, read_tensors, write_tensors
from tools.files import flush, make_folder, open_binary, read_bytes, remove_abandoned, workspace, write_new

FORMAT = 1
ALWAYS = ("model.safetensors", "optimizer.safetensors")  # files of every checkpoint
WORKSPACE = "checkpoint"  # name of the folders that checkpoints are prepared in, and removed in
OWN_HASH = "sha256_of_the_above"  # the last key of a checkpoint's state.json


class NotFiniteError(ValueError):
    """Weights or an optimizer's state that training broke; the message names the tensor and the step."""


def save(
    folder: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    extra: Mapping[str, Any],
    keep: int = 3,
    probe: nn.Module | None = None,
) -> Path:
    """Publish `folder/step-{step}/`, then remove all checkpoints but the newest `keep` (≥ 1) and this one.

    model      unwrapped (no DDP around it): its parameter names are the file's.
    optimizer  over parameters of `model`; its state may hold tensors and JSON values.
    extra      whatever else a resume needs, as JSON: configuration, loader position, metrics.
    probe      trained beside the model; goes into a file of its own, probe.safetensors.
    One process of a run calls this. Raises FileExistsError if the step is saved already, NotFiniteError naming a tensor
    (NaN is nothing to resume from), OSError if the disk is full. Older checkpoints stay whole.
    """
    folder = Path(folder)
    final = folder / f"step-{step:07d}"
    if final.exists():
        raise FileExistsError(f"{final} exists: this step is saved already")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    names = _names(model, optimizer)
    values: dict[str, Any] = {}  # by "parameter:key", or "#group:key" for what a group holds
    tensors: dict[str, Tensor] = {}
    for i, group in enumerate(optimizer.param_groups):
        owners = [(f"#{i}", {key: value for key, value in group.items() if key != "params"})]
        owners += [(names[p], optimizer.state[p]) for p in group["params"] if p in optimizer.state]
        for owner, entries in owners:
            for key, value in entries.items():
                (tensors if isinstance(value, Tensor) else values)[f"{owner}:{key}"] = value
    files = {"model.safetensors": model.state_dict(), "optimizer.safetensors": tensors}
    if probe is not None:
        files["probe.safetensors"] = probe.state_dict()
    for name, part in files.items():
        if bad := first_not_finite(part):
            raise NotFiniteError(f"{bad} ({name}) is not finite at step {step}: nothing saved, older checkpoints kept")

    make_folder(folder)
    with workspace(folder, WORKSPACE) as inside:
        partial = inside / final.name
        partial.mkdir()
        for name, part in files.items():
            write_tensors(partial / name, part)
        state = {
            "format": FORMAT,
            "step": step,
            "sha256": {name: _sha256(partial / name) for name in files},
            "optimizer": {"class": type(optimizer).__name__, "groups": _groups(optimizer, names), "values": values},
            "extra": dict(extra),
        }
        write_new(partial / "state.json", _state_text(state))
        flush(partial)
        os.rename(partial, final)
        flush(folder)
    prune(folder, keep, final)
    return final


def prune(folder: Path, keep: int, saved: Path) -> None:
    """Remove all checkpoints but the newest `keep` and this one, and what a killed process has left of others.

    A run gone back to an earlier step saves below the newest. What holds no state is not of ours.
    """
    remove_abandoned(folder, WORKSPACE)
    old = [path for _, path in _published(folder)[:-keep] if path != saved and (path / "state.json").is_file()]
    if old:
        with workspace(folder, WORKSPACE) as inside:  # killed half-way through, they must not look like checkpoints
            for path in old:
                os.rename(path, inside / path.name)


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint in `folder`, or None. An unfinished one, left by a killed save, does not count."""
    published = _published(Path(folder))
    return published[-1][1] if published else None


def latest_whole(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint in `folder`, and a line about each newer one; (None, []) if the folder has none.

    Raises DamagedError if all of them are damaged.
    """
    faults: list[str] = []
    for _, path in reversed(_published(Path(folder))):
        try:
            read_state(path)
            return path, faults
        except (DamagedError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            faults.append(str(error))
    if faults:
        raise DamagedError(f"no checkpoint in {folder} is whole: {'; '.join(faults)}")
    return None, []


class Saved(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    state: dict[str, Any]  # all of state.json

    @property
    def extra(self) -> dict[str, Any]:
        return self.state["extra"]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that it was trained with."""
        config = self.extra["config"]
        return config | {"compile": "off"} if config.get("compile") == "auto" else config  # an earlier name of it


def latest_for_all(folder: Path, main: bool, of_main: Callable[[Any], Any]) -> tuple[Path | None, list[str]]:
    """`latest_whole` as the main process finds it, for all processes; the lines say what is passed over for it.

    of_main: gives every process the main one's value.
    """
    newest, notes, refusal = None, [], ""
    if main:
        try:
            newest, faults = latest_whole(folder)
            notes = [f"{fault}: passed over, going on from {newest}" for fault in faults]
        except DamagedError as error:
            refusal = f"{error}. Put back a copy of one, or start anew with a new --out"
    newest, notes, refusal = of_main((newest, notes, refusal))
    if refusal:
        raise DamagedError(refusal)
    return newest, notes


def set_aside_newer(saved: Saved) -> list[str]:
    """Rename checkpoints newer than `saved`, which `latest_whole` passed over, to damaged-step-...; a line about each.

    Otherwise they would stand in the way of those that a run saves from there on.
    """
    notes = []
    for _, newer in reversed(_published(saved.path.parent)):
        if newer.name == saved.path.name:
            break
        names = (f"damaged-{newer.name}" + (f"-{i}" if i > 1 else "") for i in itertools.count(1))
        target = next(free for name in names if not os.path.lexists(free := newer.with_name(name)))
        os.rename(newer, target)
        notes.append(f"a damaged checkpoint is now {target}")
    if OWN_HASH not in saved.state:
        notes.append(f"{saved.path / 'state.json'} is an earlier version's: no hash tells whether it is as written")
    return notes


def read_state(path: str | Path, files: Collection[str] | None = None) -> dict[str, Any]:
    """state.json of a checkpoint that is as it was written, with all its files, or those named in `files`.

    A folder named step-N must be of step N. Checkpoints from before state.json had its own hash are read as well, held
    to those of their other files: they lack the key OWN_HASH. Raises DamagedError or FileNotFoundError naming the file.
    """
    path = Path(path)
    file = path / "state.json"
    data = read_bytes(file)
    try:
        state = json.loads(data)
        if state["format"] != FORMAT:
            raise DamagedError(
                f"{file} has format {state['format']!r}, expected {FORMAT}: it is damaged, or a later version's"
            )
        if OWN_HASH in state and data != _state_text(state).encode():
            raise DamagedError(f"{file} is damaged: it does not have the sha256 that it states")
        if strange := state.keys() - {"format", "step", "sha256", "optimizer", "extra", OWN_HASH}:
            raise DamagedError(f"{file} is damaged: it has the key {min(strange)!r}")
        if path.name.startswith("step-") and path.name != f"step-{state['step']:07d}":
            raise DamagedError(f"{file} is of step {state['step']}, which is not that of its folder's name")
        expected = {name: state["sha256"][name] for name in files or {*state["sha256"], *ALWAYS}}
    except DamagedError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged: {error!r}") from error
    for name, digest in expected.items():
        if (actual := _sha256(path / name)) != digest:
            raise DamagedError(f"{path / name} is damaged: its sha256 is {actual[:12]}…, expected {str(digest)[:12]}…")
    return state


def load(
    path: str | Path, *, model: nn.Module, optimizer: Optimizer, probe: nn.Module | None = None
) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint, bit for bit, into `model` and `optimizer`; returns (step, extra).

    Their devices and memory formats stay. A `probe` stays as it is if the checkpoint has none. Raises ValueError that
    names the file, the key, what was expected and what is there; then nothing has been changed.
    """
    path = Path(path)
    state = read_state(path)
    if "probe.safetensors" not in state["sha256"]:
        probe = None
    weights = read_tensors(path / "model.safetensors", model.state_dict())
    probed = read_tensors(path / "probe.safetensors", probe.state_dict()) if probe is not None else {}

    names, saved = _names(model, optimizer), state["optimizer"]
    if saved["class"] != type(optimizer).__name__:
        raise ValueError(f"{path}: optimizer {saved['class']} in the checkpoint, {type(optimizer).__name__} now")
    now = _groups(optimizer, names)
    if saved["groups"] != now:
        old, new = ({(i, name) for i, group in enumerate(side) for name in group} for side in (saved["groups"], now))
        raise ValueError(f"{path}: optimizer groups (index, parameter) differ, first in {sorted(old ^ new)[:3]}")
    params = {names[p]: (i, p) for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    groups: list[dict[str, Any]] = [{"params": [params[name][0] for name in group]} for group in now]
    moments: dict[int, dict[str, Any]] = {}
    for name, value in [*saved["values"].items(), *read_tensors(path / "optimizer.safetensors").items()]:
        owner, _, key = name.rpartition(":")
        if owner.startswith("#"):
            tuples = isinstance(optimizer.param_groups[int(owner[1:])].get(key), tuple)
            groups[int(owner[1:])][key] = tuple(value) if tuples else value  # JSON made a list of the betas
        else:
            i, param = params[owner]
            if isinstance(value, Tensor) and value.ndim and value.shape == param.shape:
                # with strides that are not the parameter's, multi-tensor updates fall back to one kernel a tensor
                value = torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)
            moments.setdefault(i, {})[key] = value
    model.load_state_dict(weights)
    if probe is not None:
        probe.load_state_dict(probed)
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return state["step"], state["extra"]


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
    """What differs between two configurations, a line each: "batch_size: 512 in the checkpoint, 256 now".

    Keys of nested tables are joined by dots. Keys and tables named in `allowed` may differ.
    """

    def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
        leaves: dict[str, str] = {}
        for key, value in tree.items():
            if isinstance(value, Mapping) and value:
                leaves |= flat(value, f"{prefix}{key}.")
            else:
                leaves[prefix + key] = json.dumps(value)
        return leaves

    before, now = flat(saved), flat(current)
    return [
        f"{key}: {before.get(key, 'nothing')} in the checkpoint, {now.get(key, 'nothing')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not {key, key.split(".")[0]} & set(allowed)
    ]


def _published(folder: Path) -> list[tuple[int, Path]]:
    steps = [(re.fullmatch(r"step-(\d+)", p.name), p) for p in folder.glob("step-*")]
    return sorted((int(match[1]), p) for match, p in steps if match)


def _names(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, str]:
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    foreign = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if p not in names]
    if foreign:
        raise ValueError(f"the optimizer holds parameters that are not the model's, of shapes {foreign[:3]}")
    return names


def _groups(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[list[str]]:
    return [[names[p] for p in group["params"]] for group in optimizer.param_groups]


def _state_text(state: Mapping[str, Any]) -> str:
    """The text of state.json: JSON whose last entry is the sha256 of all before it."""
    text = json.dumps({name: value for name, value in state.items() if name != OWN_HASH}, indent=1).removesuffix("\n}")
    return f'{text},\n "{OWN_HASH}": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}'


def _sha256(path: Path) -> str:
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
