"""Files of tensors: the only home of safetensors. Nothing is pickled, and nothing in a file is believed unchecked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tools.files import create, flush, open_binary

MAX_HEADER_BYTES = 1 << 20  # ResNet-152 under AdamW needs 0.2 MB; it also bounds the tensors, to some 20,000
NOT_PICKLES = (
    "A .ckpt or .pth can run code and is not read here: if you trust it, load it with torch (weights_only=True) and "
    "give its state_dict, every tensor contiguous, to safetensors.torch.save_file"
)


class DamagedError(ValueError):
    """A file that is not as it was written; the message names it and what is wrong."""


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


def read_tensors(
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
    with open_tensors(path) as file:
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


def open_tensors(path: Path) -> Any:
    """A safetensors file whose header is small enough to parse; the library checks the rest of the format."""
    with open_binary(path) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"{path} claims a header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}. {NOT_PICKLES}")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}. {NOT_PICKLES}") from error


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    return next((k for k, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)
