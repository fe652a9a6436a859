"""Checkpoints that survive kill -9, and the encoder as plain weights. The only home of safetensors.

A checkpoint is a folder `step-0000123/` of model.safetensors, optimizer.safetensors, perhaps probe.safetensors, and
state.json (all that is no tensor, the hashes of the others, and last its own). It is written under another name,
flushed to the disk and then renamed, so a name holds a whole checkpoint or does not exist; damage that comes later is
found by the hashes. Nothing is pickled, and nothing in a file is believed before it matches the model at hand.
"""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from model.encoder import LAYERS, Encoder, build_encoder
from model.names import Names, from_torchvision, to_torchvision
from model.simclr import NUM_LAYERS, ProjectionHead
from tools.files import create, flush, make_folder, open_binary, read_bytes, workspace, write_new

FORMAT = 1
MAX_HEADER_BYTES = 1 << 20  # ResNet-152 under AdamW needs 0.2 MB; it also bounds the tensors, to some 20,000
NOT_PICKLES = (
    "A .ckpt or .pth can run code and is not read here: if you trust it, load it with torch (weights_only=True) and "
    "give its state_dict, every tensor contiguous, to safetensors.torch.save_file"
)
ALWAYS = ("model.safetensors", "optimizer.safetensors")  # files of every checkpoint
WORKSPACE = "checkpoint"  # name of the folders that checkpoints are prepared in, and removed in
OWN_HASH = "sha256_of_the_above"  # the last key of a checkpoint's state.json
METADATA_KEY = "swiftclr"  # exactly one: safetensors writes several in random order, and no two files are equal


class DamagedError(ValueError):
    """A file that is not as it was written; the message names it and what is wrong."""


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
    probe      what was trained beside the model goes into a file of its own, probe.safetensors.
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
        if bad := _first_not_finite(part):
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
    # a run gone back to an earlier step saves below the newest; what holds no state is not of ours
    old = [path for _, path in _published(folder)[:-keep] if path != final and (path / "state.json").is_file()]
    if old:
        with workspace(folder, WORKSPACE) as inside:  # killed half-way through, they must not look like checkpoints
            for path in old:
                os.rename(path, inside / path.name)
    return final


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint in `folder`, or None. What a killed save left behind is not one."""
    published = _published(Path(folder))
    return published[-1][1] if published else None


def latest_whole(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that is whole, and a line about each newer one; (None, []) if there is none.

    Raises DamagedError if none of several is whole.
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
        if (found := _sha256(path / name)) != digest:
            raise DamagedError(f"{path / name} is damaged: its sha256 is {found[:12]}…, expected {str(digest)[:12]}…")
    return state


def load(
    path: str | Path, *, model: nn.Module, optimizer: Optimizer, probe: nn.Module | None = None
) -> tuple[int, dict[str, Any]]:
    """Put a checkpoint, bit for bit, into `model` and `optimizer`; returns (step, extra).

    Their devices and memory formats stay, and so does a `probe` that the checkpoint knows nothing of. Raises ValueError
    naming the file, the key, what is expected and what is there; then none has been touched.
    """
    path = Path(path)
    state = read_state(path)
    if "probe.safetensors" not in state["sha256"]:
        probe = None
    weights = _read_tensors(path / "model.safetensors", model.state_dict())
    probed = _read_tensors(path / "probe.safetensors", probe.state_dict()) if probe is not None else {}

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
    for name, value in [*saved["values"].items(), *_read_tensors(path / "optimizer.safetensors").items()]:
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

    Keys of nested tables are joined by dots. What stands in `allowed`, a key or a whole table, may differ.
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


def export_encoder(
    folder: str | Path,
    encoder: Encoder,
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    training: Mapping[str, Any],
    file: str = "encoder.safetensors",
    dtype: torch.dtype = torch.float32,
    names: Names = "torchvision",
) -> Path:
    """Write `folder/{file}`, and `folder/config.json` if timm has the architecture; returns the former.

    encoder       from build_encoder(), unwrapped; stored contiguous, as `dtype`, under torchvision's names without fc.
    image_size    side in px that it was trained at; mean, std, interpolation and crop_pct (the share of the resized
                  side kept by the centre crop) say how an image is prepared for it.
    training      recipe, data, scores: JSON that joins these facts and the architecture's in the metadata.
    names         whose key names to use; timm can load its own and torchvision's, so others get no config.json.
    torchvision's resnetNN takes the file (strict=False, for fc is missing) and timm the folder ("local-dir:FOLDER").
    Neither can build another width, selective kernels or the small stem, so those get no config.json, and `loads_in`
    in the metadata says what takes them. The metadata hold a sha256 of themselves and of the tensors. Raises
    ValueError for weights that are not finite.
    """
    folder, name = Path(folder), f"resnet{encoder.depth}"
    weights = {k: t.to(dtype) if t.is_floating_point() else t for k, t in encoder.state_dict().items()}
    if bad := _first_not_finite(weights):
        raise ValueError(f"{bad} is not finite as {dtype}: no encoder written")
    loads_in = f"torchvision and timm {name}"
    if encoder.selective_kernel:
        loads_in = "SwiftCLR's load_encoder: torchvision and timm have no such selective kernels"
    elif encoder.width != 1:
        loads_in = "SwiftCLR's load_encoder: torchvision and timm have no ResNet of this width"
    elif encoder.stem == "small":
        loads_in += " once conv1 = Conv2d(3, 64, 3, 1, 1, bias=False) and maxpool = Identity()"
    if names in ("lightly", "solo-learn"):
        loads_in = f"{names}, as the backbone of its models, and SwiftCLR's load_encoder"
    weights = {from_torchvision(key, names): tensor for key, tensor in weights.items()}
    view = dict(mean=list(mean), std=list(std), interpolation=interpolation, crop_pct=crop_pct)
    shape = dict(depth=encoder.depth, width=encoder.width, stem=encoder.stem, num_features=encoder.num_features)
    shape |= {"selective_kernel": True} if encoder.selective_kernel else {}
    facts = {
        "format": FORMAT,
        **shape,
        "image_size": image_size,
        **view,
        "names": names,
        "loads_in": loads_in,
        "training": dict(training),
    }
    timm = {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "global_pool": "avg",
        "pretrained_cfg": {
            **{"tag": "simclr", "custom_load": False, "fixed_input_size": False, "crop_mode": "center", **view},
            **{"input_size": [3, image_size, image_size], "pool_size": [math.ceil(image_size / 32)] * 2},
            **{"num_classes": 0, "first_conv": "conv1", "classifier": "fc"},
        },
    }
    make_folder(folder)
    with workspace(folder, "encoder") as partial:
        write_tensors(partial / file, weights, _hashed_facts(weights, facts))
        theirs = encoder.width == 1 and encoder.stem == "standard" and not encoder.selective_kernel
        if theirs and names in ("torchvision", "timm"):
            write_new(partial / "config.json", json.dumps(timm, indent=1))
            os.replace(partial / "config.json", folder / "config.json")
        os.replace(partial / file, folder / file)
        flush(folder)
    return folder / file


def weights_file(path: str | Path) -> Path:
    """The safetensors file meant by `path`: a file, an exported folder, a checkpoint, or a run. Raises ValueError."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a run, its encoder folder, a checkpoint or a .safetensors")
    for name in ("encoder.safetensors", "model.safetensors", "encoder/encoder.safetensors"):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} holds no encoder: neither encoder.safetensors nor model.safetensors is there")


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of a file, or of a folder that `weights_file` understands, on the CPU and in evaluation mode.

    Architecture from our metadata; a ResNet file without them is known by its shapes, under any names that model/names
    knows; fc, heads and whatever surrounds the encoder are left out, half precision becomes float32. Raises ValueError
    saying what is wrong with the file, also with one made to harm: no encoder is allocated before the header is known
    to be small and every key, shape and type to be the architecture's. Where the file has a hash, or lies in a
    checkpoint, which has one, it must be as it was written.
    """
    path = weights_file(path)
    told = read_metadata(path)
    facts = told or _facts_from_shapes(path)
    try:
        with torch.device("meta"):
            kernels = facts.get("selective_kernel", False)  # files from before the option have none
            encoder = build_encoder(facts["depth"], width=facts["width"], stem=facts["stem"], selective_kernel=kernels)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata describe no encoder: {error!r}") from error
    expected = encoder.state_dict()
    names = {from_torchvision(key, told.get("names", "torchvision")): key for key in expected} if told else None
    weights = _read_tensors(path, expected, names=names or _names_in(path), strict=told is not None, cast=True)
    if bad := _first_not_finite(weights):
        raise ValueError(f"{path}: {bad} is not finite")
    _check_hash(path)
    encoder.to_empty(device="cpu").load_state_dict(weights)
    return encoder.eval()


def load_head(path: str | Path) -> ProjectionHead:
    """The projection head of a checkpoint, or of a head alone (`save_head`), on the CPU and in evaluation mode.

    Its kind is known by its shapes. Raises ValueError if the file holds no head of ours.
    """
    path = weights_file(path)
    with _open(path) as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    names = {key: key.removeprefix("head.") for key in shapes if re.fullmatch(r"(head\.)?\d+\.\w+", key)}
    dense = [shape for key, shape in sorted(shapes.items()) if key in names and len(shape) == 2]
    kinds = [kind for kind, layers in NUM_LAYERS.items() if layers and layers == len(dense)]
    if not kinds:
        raise ValueError(f"{path} holds no projection head of 1 to 3 layers under the names head.0.weight ...")
    head = ProjectionHead(dense[0][1], kind=kinds[0], out_features=dense[-1][0])  # type: ignore[arg-type]
    head.load_state_dict(_read_tensors(path, head.state_dict(), names=names, strict=False, cast=True))
    _check_hash(path)
    return head.eval()


def save_head(path: str | Path, head: ProjectionHead) -> None:
    """Write a head alone, under the names of its layers: 0.weight, 1.weight, 1.running_mean, ..."""
    weights = head.state_dict()
    write_tensors(Path(path), weights, _hashed_facts(weights, {"format": FORMAT, "holds": "a projection head"}))


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """What export_encoder wrote into a file: architecture, preprocessing, training. None if it is not ours."""
    with _open(Path(path)) as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
    if text is None:
        return None
    try:
        facts = json.loads(text)
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']!r}, expected {FORMAT}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata {METADATA_KEY!r} are not ours: {error!r}") from error
    return facts


def _names_in(path: Path) -> dict[str, str]:
    with _open(path) as file:
        keys = list(file.keys())
    try:
        return to_torchvision(keys)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _facts_from_shapes(path: Path) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _names_in(path).items()}
    with _open(path) as file:
        shape = {
            ours: file.get_slice(names[ours]).get_shape() for ours in ("conv1.weight", "bn1.weight") if ours in names
        }
    layers = tuple(len({k.split(".")[1] for k in names if k.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in names
    depths = [depth for depth, blocks in LAYERS.items() if blocks == layers and (depth >= 50) == bottleneck]
    if not depths or len(shape.get("bn1.weight", [])) != 1:
        raise ValueError(f"{path} is no ResNet of ours: blocks {layers}, stem {shape}")
    return {
        "depth": depths[0],
        "width": shape["bn1.weight"][0] / 64,
        "stem": "small" if shape.get("conv1.weight", [])[2:] == [3, 3] else "standard",
        "selective_kernel": "layer1.0.conv2.split.0.weight" in names,
    }


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


def _first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    return next((k for k, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """One new safetensors file, flushed to the disk. Raises OSError."""
    create(path).close()
    mode = path.stat().st_mode  # what the umask grants; safetensors leaves 0600
    # copies, contiguous: safetensors refuses channels_last and tensors that share memory (one lr in two groups)
    plain = {k: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, t in tensors.items()}
    try:
        save_file(plain, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    path.chmod(mode)
    flush(path)


def _state_text(state: Mapping[str, Any]) -> str:
    """The text of state.json: JSON whose last entry is the sha256 of all before it."""
    text = json.dumps({name: value for name, value in state.items() if name != OWN_HASH}, indent=1).removesuffix("\n}")
    return f'{text},\n "{OWN_HASH}": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}'


def _tensors_sha256(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Over the facts but for this hash itself, then name, type, shape and bytes of each tensor, in order of names."""
    digest = hashlib.sha256(json.dumps(dict(facts) | {"sha256": None}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, str(plain.dtype), list(plain.shape)]).encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hashed_facts(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of a file of `tensors`: the facts about it with its hash, as sorted JSON under our one key."""
    plain = json.loads(json.dumps(facts))
    return {METADATA_KEY: json.dumps(plain | {"sha256": _tensors_sha256(tensors, plain)}, sort_keys=True)}


def _check_hash(path: Path) -> None:
    """Raises DamagedError if a file differs from a hash of it: in its metadata, or in its checkpoint's state.json.

    Files of earlier versions and of others have none.
    """
    if path.name == "model.safetensors" and path.with_name("state.json").is_file():
        read_state(path.parent, {path.name})
    facts = read_metadata(path) or {}
    if "sha256" in facts and (found := _tensors_sha256(_read_tensors(path), facts)) != facts["sha256"]:
        raise DamagedError(
            f"{path} is damaged: the sha256 of its tensors and metadata is {found[:12]}…, expected "
            f"{str(facts['sha256'])[:12]}…"
        )


def _sha256(path: Path) -> str:
    with open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path) -> Any:
    """A safetensors file whose header is small enough to parse; the library checks the rest of the format."""
    with open_binary(path) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"{path} claims a header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}. {NOT_PICKLES}")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}. {NOT_PICKLES}") from error


def _read_tensors(
    path: Path,
    expected: Mapping[str, Tensor] | None = None,
    *,
    names: Mapping[str, str] | None = None,
    strict: bool = True,
    cast: bool = False,
) -> dict[str, Tensor]:
    """All tensors, renamed by `names`; with `expected`, only if keys, shapes and types are exactly those.

    strict False passes over what is not in `names`; cast takes a half-precision tensor for the expected float32.
    """
    names = names or {}
    with _open(path) as file:
        keys = [key for key in file.keys() if strict or key in names]  # noqa: SIM118
        tensors = {names.get(key, key): file.get_tensor(key) for key in keys}
    if expected is not None:
        for key in sorted(tensors.keys() ^ expected.keys()):
            raise ValueError(f"{path}: key {key!r} is {'unexpected' if key in tensors else 'missing'}")
        for key, want in expected.items():
            found = tensors[key]
            if cast and found.dtype in (torch.float16, torch.bfloat16) and want.dtype == torch.float32:
                found = tensors[key] = found.float()
            if (found.dtype, found.shape) != (want.dtype, want.shape):
                raise ValueError(
                    f"{path}: {key} is {found.dtype} {tuple(found.shape)}, expected {want.dtype} {tuple(want.shape)}"
                )
    return tensors
