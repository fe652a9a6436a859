"""The encoder as plain weights: one safetensors file that torchvision, timm, lightly or solo-learn load as it is.

    export_encoder(folder, encoder, ...)     encoder.safetensors, and config.json where timm has the architecture
    load_encoder(path)                       from our file, a checkpoint, or another library's ResNet

The names that other libraries give to the weights stand in names.py. Nothing in a file is believed before it matches
the architecture.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import read_state
from model.encoder import LAYERS, Encoder, build_encoder
from model.names import Names, from_torchvision, to_torchvision
from model.simclr import NUM_LAYERS, ProjectionHead
from model.tensor_files import DamagedError, first_not_finite, open_tensors, read_tensors, write_tensors
from tools.files import flush, make_folder, workspace, write_new

FORMAT = 1
METADATA_KEY = "swiftclr"  # exactly one: safetensors writes several in random order, and no two files are equal


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

    encoder       from build_encoder(), unwrapped; stored contiguous, as `dtype`, without fc.
    image_size    side in px that it was trained at; mean, std, interpolation and crop_pct (the share of the resized
                  side kept by the centre crop) say how an image is prepared for it.
    training      recipe, data, scores: JSON that joins these facts and the architecture's in the metadata.
    names         the library whose names the keys get; only timm's and torchvision's get a config.json.
    torchvision's resnetNN loads the file (strict=False, because fc is missing), timm the folder ("local-dir:FOLDER").
    Neither can build another width, selective kernels or the small stem, so those get no config.json; `loads_in` in the
    metadata says what loads them. The metadata hold a sha256 of themselves and of the tensors. Raises ValueError for
    weights that are not finite.
    """
    folder, name = Path(folder), f"resnet{encoder.depth}"
    weights = {k: t.to(dtype) if t.is_floating_point() else t for k, t in encoder.state_dict().items()}
    if bad := first_not_finite(weights):
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
        in_timm = encoder.width == 1 and encoder.stem == "standard" and not encoder.selective_kernel
        if in_timm and names in ("torchvision", "timm"):
            write_new(partial / "config.json", json.dumps(timm, indent=1))
            os.replace(partial / "config.json", folder / "config.json")
        os.replace(partial / file, folder / file)
        flush(folder)
    return folder / file


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of a file, or of a folder that `weights_file` understands, on the CPU and in evaluation mode.

    Our own files state the architecture in their metadata. Of other files it is inferred from the shapes, under any
    names that names.py knows. fc, heads and whatever surrounds the encoder are left out; half precision becomes
    float32. Raises ValueError that says what is wrong with the file. A file that was made to harm allocates no encoder:
    first the header must be small, and every key, shape and type the architecture's. A file with a hash, its own or
    that of its checkpoint, must be as it was written.
    """
    path = weights_file(path)
    metadata = read_metadata(path)
    facts = metadata or _facts_from_shapes(path)
    try:
        with torch.device("meta"):
            kernels = facts.get("selective_kernel", False)  # files from before the option have none
            encoder = build_encoder(facts["depth"], width=facts["width"], stem=facts["stem"], selective_kernel=kernels)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata describe no encoder: {error!r}") from error
    expected = encoder.state_dict()
    if metadata:
        names = {from_torchvision(key, metadata.get("names", "torchvision")): key for key in expected}
    else:
        names = _names_in(path)
    weights = read_tensors(path, expected, names=names, strict=metadata is not None, cast=True)
    if bad := first_not_finite(weights):
        raise ValueError(f"{path}: {bad} is not finite")
    _check_hash(path)
    encoder.to_empty(device="cpu").load_state_dict(weights)
    return encoder.eval()


def load_head(path: str | Path) -> ProjectionHead:
    """The projection head of a checkpoint, or of a head alone (`save_head`), on the CPU and in evaluation mode.

    Its kind is known by its shapes. Raises ValueError if the file holds no head of ours.
    """
    path = weights_file(path)
    with open_tensors(path) as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    names = {key: key.removeprefix("head.") for key in shapes if re.fullmatch(r"(head\.)?\d+\.\w+", key)}
    dense = [shape for key, shape in sorted(shapes.items()) if key in names and len(shape) == 2]
    kinds = [kind for kind, layers in NUM_LAYERS.items() if layers and layers == len(dense)]
    if not kinds:
        raise ValueError(f"{path} holds no projection head of 1 to 3 layers under the names head.0.weight ...")
    head = ProjectionHead(dense[0][1], kind=kinds[0], out_features=dense[-1][0])  # type: ignore[arg-type]
    head.load_state_dict(read_tensors(path, head.state_dict(), names=names, strict=False, cast=True))
    _check_hash(path)
    return head.eval()


def save_head(path: str | Path, head: ProjectionHead) -> None:
    """Write a head alone, under the names of its layers: 0.weight, 1.weight, 1.running_mean, ..."""
    weights = head.state_dict()
    write_tensors(Path(path), weights, _hashed_facts(weights, {"format": FORMAT, "holds": "a projection head"}))


def weights_file(path: str | Path) -> Path:
    """The safetensors file in `path`: a file itself, an exported folder, a checkpoint or a run. Raises ValueError."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a run, its encoder folder, a checkpoint or a .safetensors")
    for name in ("encoder.safetensors", "model.safetensors", "encoder/encoder.safetensors"):
        if (path / name).is_file():
            return path / name
    raise ValueError(f"{path} holds no encoder: neither encoder.safetensors nor model.safetensors is there")


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """The metadata that export_encoder wrote: architecture, preprocessing, training. None for another's file."""
    with open_tensors(Path(path)) as file:
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
    with open_tensors(path) as file:
        keys = list(file.keys())
    try:
        return to_torchvision(keys)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _facts_from_shapes(path: Path) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in _names_in(path).items()}
    with open_tensors(path) as file:
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


def _check_hash(path: Path) -> None:
    """Raises DamagedError if a file differs from a hash of it: in its metadata, or in its checkpoint's state.json.

    Files of earlier versions and of others have none.
    """
    if path.name == "model.safetensors" and path.with_name("state.json").is_file():
        read_state(path.parent, {path.name})
    facts = read_metadata(path) or {}
    if "sha256" in facts and (digest := _tensors_sha256(read_tensors(path), facts)) != facts["sha256"]:
        raise DamagedError(
            f"{path} is damaged: the sha256 of its tensors and metadata is {digest[:12]}…, expected "
            f"{str(facts['sha256'])[:12]}…"
        )


def _hashed_facts(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file of `tensors`: `facts` and the hash, as sorted JSON under one key."""
    plain = json.loads(json.dumps(facts))
    return {METADATA_KEY: json.dumps(plain | {"sha256": _tensors_sha256(tensors, plain)}, sort_keys=True)}


def _tensors_sha256(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """Hash of the facts (without this hash itself) and of every tensor's name, type, shape and bytes, by name."""
    digest = hashlib.sha256(json.dumps(dict(facts) | {"sha256": None}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(json.dumps([name, str(plain.dtype), list(plain.shape)]).encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
