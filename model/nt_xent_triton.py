"""NT-Xent on the GPU: the kernels behind `model.nt_xent`, whose docstring holds the loss and its gradient.

    forward    unit rows -> (gather) -> sums of e over tiles -> loss, r, miss -> (gather r)
    backward   sum of e_ij (r_i + r_j) u_j over tiles -> minus the positive, through the normalisation -> dz

Why one pass is enough backwards: row i meets every other row j twice, in its own softmax with weight e_ij r_i and as a
candidate in j's with weight e_ji r_j. As e_ij = e_ji, one exp gives both, and the gradient has the shape of attention
without a softmax: acc += [e (r_i + r_j)] u_j, in registers, with no atomic and no second visit.

Work for M rows of length D: sums M^2 D flop (one triangle of tiles: a tile's row sums serve its rows, its column sums
its columns), gradient 4 M^2 D, where storing nothing and using no symmetry would take 2 + 4 and two separate gradient
products 2 + 8. The triangle does not pay backwards: the mirrored product would have to be added to rows that other
programs own. Exponentials: M^2 / 2 and M^2.
Memory: u (M D, half precision), partial sums (SLAB_MIB and at most 64 floats a row), partial gradients (dz itself when
one split suffices and z is fp32), and a few vectors of M: about 100 MiB for forwards or backwards at M = 131072.

Letters, in code and comments
    M rows of all ranks, `rows` = 2n of this rank, starting at row `first` of M;  D columns, padded with 0 to PAD
    i, j  a row of this rank, a row of any;  s = u_i.u_j;  e = 2^(scale s - bits) with scale = log2(e) / tau
    r = 1 / sum of e over all candidates;  miss = 1 - probability of the positive;  GAIN see below
"""

# mypy: disable-error-code="no-untyped-def"
# (arguments of a kernel are pointers and numbers on the device; the functions that launch them are annotated)

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from model.nt_xent_rows import Gather, shift

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when this module was imported
SLAB_MIB = 32

# The weight e (r_i + r_j) is at most 2 and about 2 / M. Times 2^14 it fits fp16 with normal numbers down to 4e-9.
GAIN_16_BIT = 14


@triton.jit
def _unit(z):
    """Rows of z (ROWS, PAD) at length 1, and inverse lengths; zero rows give 0 and 0. As nt_xent_rows.unit_rows."""
    largest = tl.max(tl.abs(z), 1)
    empty = largest < 1.1754943508222875e-38
    largest = tl.where(empty, 1.0, largest)
    scaled = tl.where(empty[:, None], 0.0, tl.div_rn(z, largest[:, None] + tl.zeros_like(z)))
    length = tl.maximum(tl.sqrt_rn(tl.sum(scaled * scaled, 1)), 1.0)
    return scaled / length[:, None], tl.where(empty, 0.0, tl.div_rn(1.0 / length, largest))


@triton.jit
def _rounded(x, KIND: tl.constexpr):
    """x as a matrix operand, rounded to nearest: hardware truncates fp32 to tf32, which shrinks every product."""
    if KIND == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
    elif KIND == "fp16":
        x = x.to(tl.float16)
    elif KIND == "bf16":
        x = x.to(tl.bfloat16)
    return x


@triton.jit
def _unit_rows(z, u, positive, n, D: tl.constexpr, PAD: tl.constexpr, KIND: tl.constexpr, PAIRS: tl.constexpr):
    """u (2n, PAD) = unit rows as operands, 0 in the padding; positive (n,) = s of each pair in fp32."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    d = tl.arange(0, PAD)
    mask = (pair < n)[:, None] & (d < D)[None, :]
    here = pair[:, None] * D + d[None, :]
    a, _ = _unit(tl.load(z + here, mask=mask, other=0.0).to(tl.float32))
    b, _ = _unit(tl.load(z + (tl.cast(n, tl.int64) * D) + here, mask=mask, other=0.0).to(tl.float32))
    tl.store(positive + pair, tl.sum(a * b, 1), mask=pair < n)
    here = pair[:, None] * PAD + d[None, :]
    tl.store(u + here, _rounded(a, KIND), mask=(pair < n)[:, None])
    tl.store(u + tl.cast(n, tl.int64) * PAD + here, _rounded(b, KIND), mask=(pair < n)[:, None])


@triton.jit
def _rows_of(u, start, count, PAD: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK, PAD) rows of u from row `start` on, 0 from row `count` on. 64-bit offsets: M PAD passes 2^31."""
    row = tl.arange(0, BLOCK)
    at = u + tl.cast(start, tl.int64) * PAD + row[:, None] * PAD + tl.arange(0, PAD)[None, :]
    return tl.load(at, mask=(start + row < count)[:, None], other=0.0)


@triton.jit
def _weights(
    u_i, u_j, i0, j0, n, first, M, scale, bits, KIND: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """e (BLOCK_I, BLOCK_J) of the tile at (i0, j0), 0 for a row with itself, with its positive, and past the end.

    Few tiles hold such pairs, and a branch taken by the whole tile is cheaper than comparing in all of them.
    """
    PRECISION: tl.constexpr = "ieee" if KIND == "fp32" else "tf32"
    e = tl.exp2(tl.fma(tl.dot(u_i, tl.trans(u_j), input_precision=PRECISION), scale, -bits))
    ahead = j0 - first - i0  # of the tile's first row; -BLOCK_J < ahead < BLOCK_I where the diagonal passes through
    own = (ahead < BLOCK_I) & (ahead > -BLOCK_J)
    later = (ahead - n < BLOCK_I) & (ahead - n > -BLOCK_J)
    earlier = (ahead + n < BLOCK_I) & (ahead + n > -BLOCK_J)
    if own | later | earlier | (j0 + BLOCK_J > M):
        i = (i0 + tl.arange(0, BLOCK_I))[:, None]
        j = (j0 + tl.arange(0, BLOCK_J))[None, :]
        other_view = tl.where(i < n, i + n, i - n)
        e = tl.where((j == first + i) | (j == first + other_view) | (j >= M), 0.0, e)
    return e


@triton.jit
def _row_sums(
    u,
    partial,
    rows,
    n,
    first,
    M,
    top,
    strip,
    scale,
    bits,
    PAD: tl.constexpr,
    KIND: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of e over `strip` blocks of columns, for one block of rows.

    partial (strips, rows), zeros: sums along each row. TRIANGLE, where the rows are all rows, leaves out the strips
    below the diagonal and appends (slab, rows): sums along each column of the blocks of rows of this slab, the first of
    which is `top`. Summed over its first axis, partial is what the slab adds to every row.
    """
    block = top + tl.program_id(0)
    i0 = block * BLOCK
    u_i = _rows_of(u + tl.cast(first, tl.int64) * PAD, i0, rows, PAD, BLOCK)
    start = tl.program_id(1) * strip
    stop = tl.minimum(start + strip, tl.cdiv(M, BLOCK))
    if TRIANGLE:
        start = tl.maximum(start, block)
    sums = tl.zeros((BLOCK,), tl.float32)
    for k in range(start, stop):
        u_j = _rows_of(u, k * BLOCK, M, PAD, BLOCK)
        e = _weights(u_i, u_j, i0, k * BLOCK, n, first, M, scale, bits, KIND, BLOCK, BLOCK)
        sums += tl.sum(e, 1)
        if TRIANGLE and k > block:
            j = k * BLOCK + tl.arange(0, BLOCK)
            line = tl.num_programs(1) + tl.program_id(0)
            tl.store(partial + tl.cast(line, tl.int64) * rows + j, tl.sum(e, 0), mask=j < M)
    if start < stop:
        i = i0 + tl.arange(0, BLOCK)
        tl.store(partial + tl.cast(tl.program_id(1), tl.int64) * rows + i, sums, mask=i < rows)


@triton.jit
def _close_rows(sums, positive, r, miss, loss, n, scale, bits, BLOCK: tl.constexpr):
    """r, miss and loss (2n,) from the sums over the negatives and the positive, which joins here, in fp32."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < 2 * n
    q = tl.load(sums + i, mask=mask, other=1.0)
    x = tl.load(positive + tl.where(i < n, i, i - n), mask=mask, other=0.0) * scale - bits
    inverse = 1.0 / (q + tl.exp2(x))
    tl.store(r + i, inverse, mask=mask)
    tl.store(miss + i, q * inverse, mask=mask)
    # log2(1 + q / 2^x) as max(y, 0) + log2(1 + t), y = log2 q - x, t = 2^-|y|, which neither overflows nor rounds away.
    y = tl.log2(q) - x
    t = tl.exp2(-tl.abs(y))
    w = 1.0 + t
    tail = tl.where(w == 1.0, t * 1.4426950408889634, tl.log2(w) * t / tl.where(w == 1.0, 1.0, w - 1.0))
    tl.store(loss + i, 0.6931471805599453 * (tl.maximum(y, 0.0) + tail), mask=mask)


@triton.jit
def _gradient(
    u,
    r,
    partial,
    rows,
    n,
    first,
    M,
    blocks,
    scale,
    bits,
    D: tl.constexpr,
    PAD: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """partial (splits, rows, D): 2^GAIN sum of e_ij (r_i + r_j) u_j, over `blocks` blocks of columns for each split."""
    i0 = tl.program_id(0) * BLOCK_I
    i = i0 + tl.arange(0, BLOCK_I)
    u_i = _rows_of(u + tl.cast(first, tl.int64) * PAD, i0, rows, PAD, BLOCK_I)
    r_i = tl.load(r + first + i, mask=i < rows, other=0.0)
    acc = tl.zeros((BLOCK_I, PAD), tl.float32)
    start = tl.program_id(1) * blocks
    PRECISION: tl.constexpr = "ieee" if KIND == "fp32" else "tf32"
    for k in range(start, tl.minimum(start + blocks, tl.cdiv(M, BLOCK_J))):
        u_j = _rows_of(u, k * BLOCK_J, M, PAD, BLOCK_J)
        j = k * BLOCK_J + tl.arange(0, BLOCK_J)
        r_j = tl.load(r + j, mask=j < M, other=0.0)
        e = _weights(u_i, u_j, i0, k * BLOCK_J, n, first, M, scale, bits, KIND, BLOCK_I, BLOCK_J)
        acc = tl.dot(_rounded(e * (r_i[:, None] + r_j[None, :]), KIND), u_j, acc, input_precision=PRECISION)
    d = tl.arange(0, PAD)
    at = (tl.program_id(1).to(tl.int64) * rows + i)[:, None] * D + d[None, :]
    tl.store(partial + at, acc, mask=(i < rows)[:, None] & (d < D)[None, :])


@triton.jit
def _close_gradient(
    grad, z, partial, miss, dz, n, splits, gain, weight, D: tl.constexpr, PAD: tl.constexpr, PAIRS: tl.constexpr
):
    """dz from the splits' sums: minus the positive, in fp32, then back through the normalisation of each row.

    partial may be dz: a program reads its rows whole before it writes them.
    """
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    d = tl.arange(0, PAD)
    mask = (pair < n)[:, None] & (d < D)[None, :]
    here = pair[:, None] * D + d[None, :]
    there = here + tl.cast(n, tl.int64) * D
    a, inverse_a = _unit(tl.load(z + here, mask=mask, other=0.0).to(tl.float32))
    b, inverse_b = _unit(tl.load(z + there, mask=mask, other=0.0).to(tl.float32))
    da = tl.zeros((PAIRS, PAD), tl.float32)
    db = tl.zeros((PAIRS, PAD), tl.float32)
    for split in range(splits):
        at = partial + tl.cast(split, tl.int64) * 2 * n * D
        da += tl.load(at + here, mask=mask, other=0.0)
        db += tl.load(at + there, mask=mask, other=0.0)
    pull = tl.load(miss + pair, mask=pair < n, other=0.0) + tl.load(miss + n + pair, mask=pair < n, other=0.0)
    da = da * gain - pull[:, None] * b
    db = db * gain - pull[:, None] * a
    weight = weight * tl.load(grad).to(tl.float32)
    da = (da - tl.sum(da * a, 1)[:, None] * a) * (inverse_a * weight)[:, None]
    db = (db - tl.sum(db * b, 1)[:, None] * b) * (inverse_b * weight)[:, None]
    tl.store(dz + here, da.to(dz.dtype.element_ty), mask=mask)
    tl.store(dz + there, db.to(dz.dtype.element_ty), mask=mask)


# ------------------------------------------------------------------------------------------------------------- launch


@dataclass(frozen=True)
class Shape:
    """How one program of a kernel is cut."""

    block_i: int
    block_j: int
    num_warps: int
    num_stages: int


def padded(dim: int) -> int:
    """Columns of u: a power of two, at least the 16 that a matrix instruction reads."""
    return max(16, triton.next_power_of_2(dim))


def operand_type(operands: str) -> torch.dtype:
    return {"": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16}.get(operands, torch.float32)


def shapes(dim: int, operands: str) -> tuple[Shape, Shape]:
    """The shapes of `_row_sums` and `_gradient`. Chosen by compiling, not yet by timing: nothing spills on sm_80 and
    sm_90, everything fits the 99 KiB of shared memory of sm_86 and sm_89, and up to 128 columns of half precision a
    processor holds two programs or more, by Triton 3.6 as by 3.8 (benchmarks/records/loss_kernels.csv): while one waits
    for its rows, another multiplies."""
    row_bytes = padded(dim) * operand_type(operands).itemsize
    if operands == "fp32":  # no matrix unit takes it: products go through registers, and larger tiles spill
        return Shape(16, 16, 4, 1), Shape(16, 16, 8, 1)
    if row_bytes <= 256:
        return Shape(64, 64, 4, 2), Shape(64, 32, 4, 2) if operands == "tf32" else Shape(64, 64, 4, 2)
    if row_bytes <= 512:
        return Shape(64, 64, 4, 2), Shape(64, 32, 8, 2)
    if row_bytes <= 1024:
        return Shape(64, 64, 8, 1), Shape(64, 16, 8, 1)
    return Shape(16, 16, 4, 2), Shape(16, 16, 8, 1)


def forward(
    z: Tensor, temperature: float, operands: str, gather: Gather, first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss (), u (M, PAD), r (M,) and miss (2n,); this rank's rows are [first, first + 2n) of the gathered M."""
    n, dim, pad, kind = len(z) // 2, z.shape[1], padded(z.shape[1]), operands or "fp16"
    scale, bits = math.log2(math.e) / temperature, shift(temperature)
    local = z.new_empty((2 * n, pad), dtype=operand_type(operands))
    positive, r, miss, loss = (z.new_empty(rows, dtype=torch.float32) for rows in (n, 2 * n, 2 * n, 2 * n))
    with _on(z.device):
        pairs = _pairs(pad)
        _unit_rows[(triton.cdiv(n, pairs),)](z, local, positive, n, dim, pad, kind, pairs)
        u = gather(local)
        sums = row_sums(u, n, first, scale, bits, kind, shapes(dim, operands)[0])
        _close_rows[(triton.cdiv(2 * n, 256),)](sums, positive, r, miss, loss, n, scale, bits, 256)
        return loss.mean(), u, gather(r), miss


def row_sums(
    u: Tensor, n: int, first: int, scale: float, bits: float, kind: str, shape: Shape, triangle: bool | None = None
) -> Tensor:
    """(2n,) sums of e over the negatives. The triangle of tiles suffices when the rows of this rank are all rows."""
    rows, pad, block = 2 * n, u.shape[1], shape.block_i
    triangle = len(u) == rows if triangle is None else triangle
    blocks, column_blocks = triton.cdiv(rows, block), triton.cdiv(len(u), block)
    # Long strips load a block of rows once for many columns; short ones keep every processor busy, four times over.
    tiles = blocks * column_blocks // (2 if triangle else 1)
    strip = max(1, min(16, tiles // (4 * _processors(u.device))), triton.cdiv(column_blocks, 64))
    strips = triton.cdiv(column_blocks, strip)
    slab = max(1, min(blocks, (SLAB_MIB << 20) // (4 * rows))) if triangle else blocks
    sums: list[Tensor] = []
    for top in range(0, blocks, slab):
        height = min(slab, blocks - top)
        partial = u.new_zeros((strips + (height if triangle else 0), rows), dtype=torch.float32)
        _row_sums[(height, strips)](
            u, partial, rows, n, first, len(u), top, strip, scale, bits, pad, kind, triangle, block,
            num_warps=shape.num_warps, num_stages=shape.num_stages,
        )  # fmt: skip
        sums.append(partial.sum(0))
    return functools.reduce(torch.add, sums)


def backward(
    grad: Tensor, z: Tensor, u: Tensor, r: Tensor, miss: Tensor, temperature: float, operands: str, first: int
) -> Tensor:
    """dz (2n, D) in the type of z."""
    n, dim, pad, kind = len(z) // 2, z.shape[1], padded(z.shape[1]), operands or "fp16"
    gain = GAIN_16_BIT if operand_type(operands).itemsize == 2 else 0
    scale, bits = math.log2(math.e) / temperature, shift(temperature)
    dz = torch.empty_like(z)
    with _on(z.device):
        partial = weighted_sums(u, r, n, first, dim, scale, bits - gain, kind, shapes(dim, operands)[1], out=dz)
        pairs = _pairs(pad)
        _close_gradient[(triton.cdiv(n, pairs),)](
            grad, z, partial, miss, dz, n, len(partial), 2.0**-gain, 1 / (temperature * 2 * n), dim, pad, pairs
        )
    return dz


def weighted_sums(
    u: Tensor,
    r: Tensor,
    n: int,
    first: int,
    dim: int,
    scale: float,
    bits: float,
    kind: str,
    shape: Shape,
    out: Tensor | None = None,
) -> Tensor:
    """(splits, 2n, dim) sums of e (r_i + r_j) u_j, to be added up; in `out` where one split suffices and it is fp32."""
    rows, pad = 2 * n, u.shape[1]
    blocks, column_blocks = triton.cdiv(rows, shape.block_i), triton.cdiv(len(u), shape.block_j)
    # Few rows leave processors idle unless several share a block of rows, each with a part of the columns.
    share = triton.cdiv(column_blocks, max(1, _processors(u.device) // blocks))
    splits = triton.cdiv(column_blocks, share)
    if out is not None and splits == 1 and out.dtype == torch.float32:
        partial = out[None]
    else:
        partial = u.new_empty((splits, rows, dim), dtype=torch.float32)
    _gradient[(blocks, splits)](
        u, r, partial, rows, n, first, len(u), share, scale, bits, dim, pad, kind, shape.block_i, shape.block_j,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    return partial


def _pairs(pad: int) -> int:
    """Pairs of rows per program of the kernels that go through z once: about 1024 numbers."""
    return max(1, 1024 // pad)


def _on(device: torch.device) -> AbstractContextManager:
    """Kernels start on the current GPU, which need not be the one that holds z."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; the interpreter counts as 4, so that it goes through splits and strips too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# ---------------------------------------------------------------- what a compiled kernel takes, on any GPU or on none

KERNELS = {
    "unit_rows": _unit_rows,
    "row_sums": _row_sums,
    "close_rows": _close_rows,
    "gradient": _gradient,
    "close_gradient": _close_gradient,
}


def resources(kernel: str, capability: int, dim: int, operands: str, shape: Shape | None = None) -> dict[str, int]:
    """Compiles a kernel as shipped (or in another shape) and reads registers, spills, shared memory and matrix
    instructions from the machine code, and how many programs a processor holds at once by them. capability is 80 for
    sm_80. Needs no GPU; Triton's wheel brings the tools."""
    function, pad = KERNELS[kernel], padded(dim)
    tuned = dict(zip(("row_sums", "gradient"), shapes(dim, operands), strict=True))
    shape = shape or tuned.get(kernel, Shape(256, 256, 4, 1))
    constants = {
        "D": dim,
        "PAD": pad,
        "KIND": operands,
        "TRIANGLE": True,
        "PAIRS": _pairs(pad),
        "BLOCK": shape.block_i,
        "BLOCK_I": shape.block_i,
        "BLOCK_J": shape.block_j,
    }
    operand = {"fp16": "*fp16", "bf16": "*bf16"}.get(operands, "*fp32")
    integers = {"rows", "n", "first", "M", "top", "strip", "blocks", "splits"}
    numbers = {"scale", "bits", "gain", "weight"}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return "i32" if name in integers else "fp32" if name in numbers else operand if name == "u" else "*fp32"

    signature = {name: kind(name) for name in function.arg_names}
    values = {(i,): constants[name] for i, name in enumerate(function.arg_names) if name in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if kind(name)[0] == "*"}
    compiled = triton.compile(
        triton.compiler.ASTSource(function, signature, values, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": shape.num_warps, "num_stages": shape.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name)
        code = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", cubin.name)

    def number(field: str) -> int:
        found = re.search(rf"{field}:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump does not report {field}: {usage!r}")
        return int(found[1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}\b", code))

    registers, shared_bytes = number("REG"), compiled.metadata.shared
    return {
        "registers": registers,
        "stack_bytes": number("STACK"),
        "spills": count("STL") + count("LDL"),
        "shared_bytes": shared_bytes,
        "programs": programs(capability, registers, shared_bytes, shape.num_warps),
        "hgmma": count("HGMMA"),
        "hmma": count("HMMA"),
    }


def programs(capability: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs that a streaming multiprocessor of sm_80 or sm_90 holds at once (CUDA C++ Programming Guide, table of
    technical specifications): 64 warps and 65,536 registers, which a warp takes in steps of 256; 164 or 228 KiB of
    shared memory, of which each program takes 1 KiB besides its own."""
    kib = {80: 164, 90: 228}[capability]
    registers_of_warp = 256 * triton.cdiv(32 * registers, 256)
    return min(64 // num_warps, 65536 // registers_of_warp // num_warps, kib * 1024 // (shared_bytes + 1024))


def _tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
