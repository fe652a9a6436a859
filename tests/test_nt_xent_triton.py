"""The NT-Xent kernels: run by Triton's interpreter, compiled for GPUs that are not here, and run on one that is.

Triton decides on import whether it interprets, for the whole process. The interpreter therefore has a process of its
own, and this one compiles.
"""

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from torch import library

from model.nt_xent import nt_xent, resolve
from model.nt_xent_rows import shift
from tests.oracles import nt_xent as oracle
from tests.test_nt_xent import CASES, SPECIAL, errors, fp32_margin, projections, run, special

kernel_module = pytest.importorskip("model.nt_xent_triton", reason="no Triton here", exc_type=ImportError)

ROUNDING: dict[str, Callable] = {"fp16": oracle.to_fp16, "tf32": oracle.to_mantissa(10), "bf16": oracle.to_mantissa(7)}
MARGIN = 1.5  # roundings of the kernel and of the model below fall differently; their worst rows differ by less


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable]:
    """Calls a function of this module in a process that interprets kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # for the child, which starts with the first call
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield lambda function, *arguments: process.submit(function, *arguments).result()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def compute(request) -> Callable:
    """Loss and dz of the kernels for (z, temperature, operands, dtype): interpreted, and on a GPU if there is one."""
    if request.param == "interpreter":
        call = request.getfixturevalue("interpreter")
        return lambda z, temperature, operands=None, dtype=torch.float32: call(kernels, z, temperature, operands, dtype)
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels are interpreted and compiled here, not run")
    return lambda *arguments: kernels(*arguments, device="cuda")


def kernels(
    z: oracle.Array,
    temperature: float,
    operands: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[float, oracle.Array]:
    x = torch.tensor(z, dtype=dtype, device=device, requires_grad=True)
    loss = nt_xent(x, temperature, impl="triton", operands=operands)  # type: ignore[arg-type]
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == dtype
    return loss.item(), x.grad.double().cpu().numpy()


def assert_errs_as_its_operands(result, z, temperature, operands=None) -> None:
    """As far from equation 1 as float64 arithmetic on rounded operands is, half as much again, plus fp32's own."""
    margin = fp32_margin(z.shape[1], temperature)
    allowed = (0.0, 0.0)
    if operands != "fp32":
        allowed = errors(*oracle.rounded(z, temperature, ROUNDING[operands or "fp16"]), z, temperature)
    actual = errors(*result, z, temperature)
    assert actual[0] <= MARGIN * allowed[0] + margin
    assert actual[1] <= MARGIN * allowed[1] + margin


# Each width and each temperature at least twice; the whole table is for the CPU paths, which are fast.
@pytest.mark.parametrize(("n", "dim", "temperature"), CASES[:25:2] + CASES[27:28])
def test_value_and_gradient_err_as_their_operands(compute, n, dim, temperature):
    z = projections(n, dim)
    assert_errs_as_its_operands(compute(z, temperature), z, temperature)


@pytest.mark.parametrize("operands", ["fp16", "tf32", "fp32"])
@pytest.mark.parametrize("dim", [16, 200, 512])
def test_every_operand_type_and_width(compute, dim, operands):
    z = projections(45, dim)
    assert_errs_as_its_operands(compute(z, 0.1, operands), z, 0.1, operands)


@pytest.mark.parametrize("temperature", [0.013, 0.1])
@pytest.mark.parametrize("name", SPECIAL)
def test_degenerate_rows_are_finite_and_exact(compute, name, temperature):
    z = special(name)
    assert_errs_as_its_operands(compute(z, temperature), z, temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_projections(compute, dtype):
    z = torch.tensor(projections(37, 64)).to(dtype).double().numpy()
    loss, dz = compute(z, 0.1, "fp32", dtype)
    assert abs(loss - oracle.nt_xent(z, 0.1)) < fp32_margin(64, 0.1)
    exact = oracle.nt_xent_gradient(z, 0.1)
    np.testing.assert_allclose(dz, exact, rtol=torch.finfo(dtype).eps, atol=2.0**-24)


def test_equal_input_gives_bitwise_equal_results(compute):
    z = projections(150, 64)
    first, second = compute(z, 0.1), compute(z, 0.1)
    assert first[0] == second[0]
    assert (first[1] == second[1]).all()


def test_one_triangle_in_any_slabs_sums_to_the_whole(interpreter):
    """Exactly, but for the order of additions: a slab holds one block of rows, or all."""
    interpreter(compare_row_sums)


def compare_row_sums() -> None:
    from model import nt_xent_triton as triton_module

    n, scale = 150, math.log2(math.e) / 0.1
    u = torch.nn.functional.normalize(torch.tensor(projections(n, 32), dtype=torch.float32)).half()
    shape = triton_module.Shape(64, 64, 4, 2)
    whole, triangle = (
        triton_module.row_sums(u, n, 0, scale, shift(0.1), "fp16", shape, triangle=triangle)
        for triangle in (False, True)
    )
    triton_module.SLAB_MIB = 0
    slabs = triton_module.row_sums(u, n, 0, scale, shift(0.1), "fp16", shape, triangle=True)
    for sums in (triangle, slabs):
        torch.testing.assert_close(sums, whole, rtol=2.0**-20, atol=0)


def test_operator_is_registered_as_torch_asks(interpreter):
    interpreter(check_operator)


def check_operator() -> None:
    rows = projections(6, 8)
    z = torch.tensor(rows, dtype=torch.float32, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(torch.ops.swiftclr.nt_xent.default, (z, 0.1, "triton", "", "", 1, 0), test_utils=checks)
    step = torch.compile(lambda z: nt_xent(2 * z, 0.1, impl="triton"), fullgraph=True, backend="aot_eager")
    loss = step(z)
    loss.backward()
    assert z.grad is not None
    assert_errs_as_its_operands((loss.item(), z.grad.double().numpy()), rows, 0.1)


# -------------------------------------------------------------------------------------- compiled for GPUs not present


@pytest.mark.parametrize(
    ("capability", "dim", "operands", "row_sums", "gradient"),
    [
        (80, 128, "fp16", 3, 2),
        (90, 128, "fp16", 4, 2),
        (90, 64, "bf16", 4, 2),
        (90, 512, "fp16", 1, 1),
        (80, 128, "tf32", 2, 1),
    ],
)
def test_shipped_shapes_use_the_matrix_unit_and_spill_nothing(capability, dim, operands, row_sums, gradient):
    """And a processor holds so many programs or more. sm_80 code must fit the 99 KiB of sm_86 and sm_89 as well.

    It must hold for the oldest and the newest Triton that are supported: this runs by the one that is installed.
    """
    instruction, shared_kib = {80: ("hmma", 99), 90: ("hgmma", 227)}[capability]
    for kernel, programs in (("row_sums", row_sums), ("gradient", gradient)):
        resources = kernel_module.resources(kernel, capability, dim, operands)
        assert resources["spills"] == resources["stack_bytes"] == 0
        assert resources[instruction] > 0
        assert resources["shared_bytes"] <= shared_kib * 1024
        assert resources["programs"] >= programs, resources


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((80, 128, 32 * 1024, 4), 4),  # 4 x 4 warps of 4,096 registers are all there are
        ((80, 129, 32 * 1024, 4), 3),  # 136 a thread
        ((90, 32, 1024, 8), 8),  # 64 warps
        ((90, 64, 113 * 1024, 4), 2),  # twice 114 KiB of shared memory
        ((80, 64, 82 * 1024, 4), 1),
        ((90, 177, 102400, 8), 1),  # what 128 x 128 tiles of 8 warps would take by Triton 3.6
    ],
)
def test_programs_of_a_processor_are_counted_as_the_guide_does(given, expected):
    assert kernel_module.programs(*given) == expected


def test_kernels_beside_the_matrix_spill_nothing():
    for kernel in ("unit_rows", "close_rows", "close_gradient"):
        assert kernel_module.resources(kernel, 80, 128, "fp16")["spills"] == 0


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_in_a_cuda_graph_without_a_synchronisation():
    z = torch.tensor(projections(300, 128), dtype=torch.float32, device="cuda", requires_grad=True)
    assert resolve("auto", "cuda")[0] == "triton"

    def step() -> torch.Tensor:
        z.grad = None
        loss = nt_xent(z, 0.1)
        loss.backward()
        return loss

    torch.cuda.set_sync_debug_mode("error")
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    other = projections(300, 128, seed=1)
    with torch.no_grad():
        z.copy_(torch.tensor(other))
    graph.replay()
    assert_errs_as_its_operands((loss.item(), z.grad.double().cpu().numpy()), other, 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_other_implementations_on_cuda(impl):
    z = projections(257, 64)
    x = torch.tensor(z, dtype=torch.float64, device="cuda", requires_grad=True)
    loss = nt_xent(x, 0.1, impl=impl)
    loss.backward()
    expected = run(z, 0.1, impl, torch.float64)
    assert abs(loss.item() - expected[0]) < 1e-12
    np.testing.assert_allclose(x.grad.cpu().numpy(), expected[1], atol=1e-13)
