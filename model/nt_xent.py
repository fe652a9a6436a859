"""NT-Xent, the loss of SimCLR: each view must find its other view among all the rows of the batch.

    nt_xent(z, temperature, *, group=None, impl="auto", operands=None) -> loss
    resolve(impl, device, ...) -> (the implementation that runs, why)

Chen et al. 2020, eq. 1 and Algorithm 1, arXiv:2002.05709. With M rows u_i = z_i / |z_i|, p the other view of i and
s_ij = u_i.u_j,

    loss_i = -log( exp(s_ip / tau) / sum over j != i of exp(s_ij / tau) )

"reference" writes that down and stores the M x M matrix. "chunked" (nt_xent_tiles.py) and "triton" (nt_xent_triton.py)
store none:

    e_ij   = exp(s_ij / tau)                                      one shift serves all rows, see nt_xent_rows
    Q_i    = sum over j != i, p of e_ij    R_i = Q_i + e_ip       sums over the negatives, over all candidates
    r_i    = 1 / R_i                       miss_i = Q_i r_i       miss is 1 - the probability of the positive
    loss_i = log(1 + Q_i / e_ip)

Row i appears in its own loss and, as a candidate, in every other one, and e is symmetric; with L the mean over M rows

    dL/du_i = [ sum over j != i, p of e_ij (r_i + r_j) u_j  -  (miss_i + miss_p) u_p ] / (tau M)
    dL/dz_i = ( dL/du_i - (dL/du_i . u_i) u_i ) / |z_i|

The positive never enters the matrix: e_ip (r_i + r_p) - 2 would cancel to nothing as the views align, and rounding it
to half precision costs 2 % of the gradient at tau = 0.05 and 88 % at 0.02. Both passes visit every element once, with
one exp; nothing is added atomically, so equal inputs give bitwise equal results. Between ranks the rows u are gathered,
then the M numbers r; each rank then has the complete gradient of its own rows and sends none.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, library
from torch.distributed.distributed_c10d import _resolve_process_group

from model import nt_xent_tiles
from model.nt_xent_rows import gather_rows, reference
from model.nt_xent_tiles import one_thread_each

Impl = Literal["auto", "triton", "chunked", "reference"]
Operands = Literal["fp16", "bf16", "tf32", "fp32"]

# From here up exp(s / tau) of every pair, and the sum of 2^24 of them, are normal fp32 numbers: 2 log2(e) / tau + 25
# binary digits fit between 2^-126 and 2^127.
MIN_TEMPERATURE = 0.0128
MAX_TRITON_DIM = 512
# Up to here the plain matrix is faster on a CPU, forward and backward: 5.6 against 7.7 ms at 512 rows of 128 with four
# threads of a Xeon with AMX, 7.7 against 8.0 with one (loss.csv); at 1024 rows tiles win.
SMALL_ON_CPU = 512


def nt_xent(
    z: Tensor,
    temperature: float,
    *,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
    operands: Operands | None = None,
) -> Tensor:
    """NT-Xent: each row must pick its other view out of all the remaining rows.

    z            (2n, D) projections of any float type, view-major; rows are L2-normalised here, in fp32. A zero row
                 is similar to nothing (s = 0), its own view included, and gets a zero gradient.
    temperature  > 0; below 0.0128 only "reference" is exact, and runs. The authors use 0.1 for ImageNet and 0.5 for
                 CIFAR-10.
    group        ranks whose rows serve as negatives too, each with as many rows; None keeps to this process.
    impl         "auto" is what `resolve` says; naming one insists on it.
    operands     what the matrix products read; sums are fp32. None is fp16 for triton, which also takes bf16, tf32 and
                 fp32, and fp32 for chunked, which also takes bf16 on processors that multiply it.
    Returns a () tensor, fp32 (fp64 for fp64 z): the mean over the 2n rows of this rank, so the mean over ranks is the
    global loss, and averaging the ranks' gradients, as DDP does, gives the gradient of the global loss. (The authors'
    TensorFlow code adds the two views' means and so reports twice this.) Autocast is switched off inside. The gradient
    is one level deep for "chunked" and "triton". ValueError for an odd row count or an implementation that cannot run.
    """
    if z.ndim != 2 or len(z) == 0 or len(z) % 2:
        raise ValueError(f"z must be (2n, D), both views of n images stacked; got shape {tuple(z.shape)}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, got {z.dtype}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    world_size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    name, _ = resolve(
        impl, z.device, rows=len(z), dim=z.shape[1], dtype=z.dtype, temperature=temperature, operands=operands
    )
    if name == "reference":
        return reference(z, temperature, group=group)
    group_name = "" if group is None or world_size == 1 else group.group_name
    loss, *_ = torch.ops.swiftclr.nt_xent(z, float(temperature), name, operands or "", group_name, world_size, rank)
    return loss


# ---------------------------------------------------------------------------------------------------- what runs where


def resolve(
    impl: Impl,
    device: torch.device | str,
    *,
    rows: int | None = None,
    dim: int = 128,
    dtype: torch.dtype = torch.float32,
    temperature: float = 0.1,
    operands: Operands | None = None,
) -> tuple[str, str]:
    """Names the implementation that `nt_xent` runs, and why. rows is this rank's 2n; None stands for many."""
    kind = torch.device(device).type

    def refusal(name: str) -> str | None:
        if name == "triton":
            return _triton_refusal(torch.device(device), dim, dtype, temperature, operands)
        if name == "chunked":
            return _chunked_refusal(kind, temperature, operands)
        return None if operands is None else f"the reference multiplies z as it is, not {operands}; leave operands out"

    if impl != "auto":
        if impl not in ("triton", "chunked", "reference"):
            raise ValueError(f"impl must be auto, triton, chunked or reference, got {impl!r}")
        if why := refusal(impl):
            raise ValueError(f'impl="{impl}" cannot run: {why}')
        return impl, "asked for"
    no_kernels = refusal("triton") if kind == "cuda" else f"z is on {kind}"
    if not no_kernels:
        return "triton", "fused kernels, no matrix stored"
    no_tiles = refusal("chunked")
    if not no_tiles and not (kind == "cpu" and operands is None and rows is not None and rows <= SMALL_ON_CPU):
        if kind == "cuda":
            warnings.warn(f"NT-Xent runs chunked, several times slower than its kernels: {no_kernels}", stacklevel=3)
        return "chunked", f"tiles of the matrix, none stored; {no_kernels}"
    if why := refusal("reference"):
        raise ValueError(f'operands="{operands}" cannot run on {kind}: {no_tiles}; {why}')
    return "reference", f"stores the matrix; {no_tiles or f'{rows} rows are too few for tiles to pay'}"


def _triton_refusal(
    device: torch.device, dim: int, dtype: torch.dtype, temperature: float, operands: Operands | None
) -> str | None:
    if dtype == torch.float64:
        return 'its sums are fp32, z is float64; use impl="chunked"'
    if dim > MAX_TRITON_DIM:
        return f'a row must fit in shared memory, so at most {MAX_TRITON_DIM} columns, got {dim}; use impl="chunked"'
    if temperature < MIN_TEMPERATURE:
        return _below_fp32(temperature)
    if operands not in (None, "fp16", "bf16", "tf32", "fp32"):
        return f"operands must be fp16, bf16, tf32 or fp32, got {operands!r}"
    if device.type != "cuda" and operands == "bf16":
        return "it needs a CUDA GPU: without one there is only Triton's interpreter, which multiplies bf16 wrongly"
    return _no_kernels_on(device)


@torch.compiler.assume_constant_result  # what the machine has cannot change between two steps
def _no_kernels_on(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f'it needs compute capability 8.0, this GPU has {major}.{minor}; use "chunked"'
    from model.nt_xent_triton import INTERPRETED

    if device.type == "cpu" and INTERPRETED:
        return None
    return f'it needs a CUDA GPU, z is on {device}; use impl="chunked" (or TRITON_INTERPRET=1 for a slow check)'


def _chunked_refusal(kind: str, temperature: float, operands: Operands | None) -> str | None:
    if temperature < MIN_TEMPERATURE:
        return _below_fp32(temperature)
    if operands not in (None, "fp32", "bf16"):
        return f'chunked multiplies fp32 or bf16, not {operands}; on a CUDA GPU use impl="triton"'
    if operands == "bf16" and not (kind == "cpu" and _cpu_multiplies_bf16()):
        return 'bf16 products inside fp32 need a CPU with bf16 instructions; use operands="fp32"'
    return None


@torch.compiler.assume_constant_result
def _cpu_multiplies_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _below_fp32(temperature: float) -> str:
    return f'at temperature {temperature} < {MIN_TEMPERATURE} exp leaves the range of fp32; use impl="reference"'


# ------------------------------------------------------------------------------- the operator around chunked and triton
# One operator for both, so that torch.compile and CUDA graphs see a single node with a known shape and gradient.


@library.custom_op("swiftclr::nt_xent", mutates_args=())
def _nt_xent(
    z: Tensor, temperature: float, impl: str, operands: str, group_name: str, world_size: int, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (), and for the backward all ranks' u (M, padded D) and r (M,), this rank's miss (2n,)."""

    def gather(x: Tensor) -> Tensor:
        return x if world_size == 1 else gather_rows(x, _resolve_process_group(group_name))  # type: ignore[arg-type]

    forward, _ = _implementation(impl)
    with torch.autocast(z.device.type, enabled=False), one_thread_each(z.device.type):
        return forward(z.contiguous(), temperature, operands, gather, rank * len(z))


@_nt_xent.register_fake
def _(
    z: Tensor, _temperature: float, impl: str, operands: str, _group_name: str, world_size: int, _rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = torch.promote_types(z.dtype, torch.float32)
    if impl == "chunked":
        u = z.new_empty((world_size * len(z), z.shape[1]), dtype=sums)
    else:
        from model.nt_xent_triton import operand_type, padded

        u = z.new_empty((world_size * len(z), padded(z.shape[1])), dtype=operand_type(operands))
    return z.new_empty((), dtype=sums), u, z.new_empty(len(u), dtype=sums), z.new_empty(len(z), dtype=sums)


@library.custom_op("swiftclr::nt_xent_backward", mutates_args=())
def _nt_xent_backward(
    grad: Tensor, z: Tensor, u: Tensor, r: Tensor, miss: Tensor, temperature: float, impl: str, operands: str, rank: int
) -> Tensor:
    """dz (2n, D), from what the forward kept."""
    _, backward = _implementation(impl)
    with torch.autocast(z.device.type, enabled=False), one_thread_each(z.device.type):
        return backward(grad, z.contiguous(), u, r, miss, temperature, operands, rank * len(z))


@_nt_xent_backward.register_fake
def _(_grad: Tensor, z: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z, temperature, impl, operands, _, _, rank = inputs
    _, u, r, miss = output
    ctx.mark_non_differentiable(u, r, miss)
    ctx.save_for_backward(z, u, r, miss)
    ctx.arguments = temperature, impl, operands, rank


def _pull_back(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _nt_xent_backward(grad, *ctx.saved_tensors, *ctx.arguments), *(None,) * 6


_nt_xent.register_autograd(_pull_back, setup_context=_keep)


def _implementation(name: str) -> tuple[Callable, Callable]:
    if name == "chunked":
        return nt_xent_tiles.forward, nt_xent_tiles.backward
    from model import nt_xent_triton

    return nt_xent_triton.forward, nt_xent_triton.backward
