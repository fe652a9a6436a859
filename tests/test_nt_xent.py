"""NT-Xent on the CPU: the plain reference and the tiles against equation 1, and the promises around them."""

import math

import numpy as np
import pytest
import torch
from torch import library

from model.nt_xent import Impl, nt_xent, resolve
from model.nt_xent_rows import reference
from tests.oracles import nt_xent as oracle

SIZES = [1, 2, 3, 37, 100, 257]
DIMS = [24, 64, 100, 128, 256]
TEMPERATURES = [0.013, 0.05, 0.1, 0.5, 1.0]
# Every size meets every width and every temperature, and every width every temperature; the small ones in full.
CASES = [(n, DIMS[k], TEMPERATURES[(k + i) % 5]) for i, n in enumerate(SIZES) for k in range(5)]

SPECIAL = [
    "equal rows",
    "a zero row",
    "only zero rows",
    "huge",
    "tiny",
    "mixed lengths",
    "equal views",
    "opposite views",
]


def projections(n: int, dim: int, *, seed: int = 0) -> oracle.Array:
    """(2n, dim) of related views, as fp32 numbers."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, dim))
    return np.concatenate([a, 0.7 * a + 0.7 * rng.normal(size=(n, dim))]).astype(np.float32).astype(np.float64)


def special(name: str) -> oracle.Array:
    z = projections(20, 32)
    if name == "equal rows":
        z[:] = z[0]
    elif name == "a zero row":
        z[7] = 0
    elif name == "only zero rows":
        z[:] = 0
    elif name == "huge":
        z *= 1e30
    elif name == "tiny":
        z *= 1e-30
    elif name == "mixed lengths":
        z *= np.logspace(-20, 20, len(z))[:, None]
    elif name == "equal views":
        z[20:] = z[:20]
    elif name == "opposite views":
        z[20:] = -z[:20]
    return z.astype(np.float32).astype(np.float64)


def errors(loss: float, dz: oracle.Array, z: oracle.Array, temperature: float) -> tuple[float, float]:
    """How far loss and dz are from equation 1. dz in units of 1 / (tau M |z_i|), in which it is a sum of unit vectors
    with weights that are differences of probabilities: errors then mean the same at every size, length and tau."""
    exact_loss, exact_dz = oracle.nt_xent(z, temperature), oracle.nt_xent_gradient(z, temperature)
    zero = ~z.any(axis=1)
    assert np.isfinite(loss)
    assert np.isfinite(dz).all()
    assert not dz[zero].any()
    length = np.sqrt((z * z).sum(axis=1, keepdims=True))
    return abs(loss - exact_loss), float((np.abs(dz - exact_dz) * length).max() * temperature * len(z))


def fp32_margin(dim: int, temperature: float) -> float:
    """A dot product of D terms walks about sqrt(D) roundings from the truth, and a logit is that over tau; it decides
    two weights per pair, of rows that were rounded a few times themselves."""
    return 2 * 2.0**-23 * (8 + math.sqrt(dim) / temperature)


def run(z: oracle.Array, temperature: float, impl: Impl, dtype: torch.dtype = torch.float32, **options):
    """Loss and dz of `nt_xent` as float64."""
    x = torch.tensor(z, dtype=dtype, requires_grad=True)
    loss = nt_xent(x, temperature, impl=impl, **options)
    loss.backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    return loss.item(), x.grad.double().numpy()


def test_oracle_gradient_is_the_slope_of_its_value():
    z = projections(4, 5)
    slope = np.zeros_like(z)
    for at in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[at] = 1e-6
        slope[at] = (oracle.nt_xent(z + step, 0.3) - oracle.nt_xent(z - step, 0.3)) / 2e-6
    np.testing.assert_allclose(oracle.nt_xent_gradient(z, 0.3), slope, atol=1e-8)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize(("n", "dim", "temperature"), CASES)
def test_value_and_gradient_are_those_of_equation_1(n, dim, temperature, impl):
    z = projections(n, dim)
    loss, dz = errors(*run(z, temperature, impl, torch.float64), z, temperature)
    assert loss < 1e-13 * (1 + 1 / temperature)
    assert dz < 1e-13 * (1 + 1 / temperature)
    loss, dz = errors(*run(z, temperature, impl), z, temperature)
    assert loss < fp32_margin(dim, temperature)
    assert dz < fp32_margin(dim, temperature)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("temperature", [0.013, 0.1])
@pytest.mark.parametrize("name", SPECIAL)
def test_degenerate_rows_are_finite_and_exact(name, temperature, impl):
    z = special(name)
    loss, dz = errors(*run(z, temperature, impl), z, temperature)
    assert loss < fp32_margin(32, temperature)
    assert dz < fp32_margin(32, temperature)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_projections_lose_nothing_but_their_own_rounding(dtype, impl):
    z = torch.tensor(projections(37, 64)).to(dtype).double().numpy()
    loss, dz = run(z, 0.1, impl, dtype)
    exact = oracle.nt_xent_gradient(z, 0.1)
    assert abs(loss - oracle.nt_xent(z, 0.1)) < fp32_margin(64, 0.1)
    # dz is rounded once to the type of z, half a unit in the last place; below 2^-14 fp16 has 2^-24 steps.
    np.testing.assert_allclose(dz, exact, rtol=torch.finfo(dtype).eps, atol=2.0**-24)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_autocast_does_not_reach_the_loss(impl):
    """Nor its gradient, where backward runs outside the context, as PyTorch asks."""
    z = projections(100, 64)
    x = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert nt_xent(x.bfloat16(), 0.1, impl=impl).dtype == torch.float32
        loss = nt_xent(x, 0.1, impl=impl)
    loss.backward()
    plain = run(z, 0.1, impl)
    assert loss.item() == plain[0]
    assert (x.grad.double().numpy() == plain[1]).all()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gradcheck(impl):
    z = torch.tensor(projections(5, 6), requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, 0.2, impl=impl), (z,))


def test_nan_and_infinity_are_not_hidden():
    for bad in (math.nan, math.inf):
        z = torch.tensor(projections(4, 8))
        z[3, 2] = bad
        assert math.isnan(nt_xent(z, 0.1, impl="chunked"))
        assert math.isnan(nt_xent(z, 0.1, impl="reference"))


def test_compiled_without_a_break_for_any_size():
    torch._dynamo.reset()
    step = torch.compile(lambda z: nt_xent(2 * z, 0.1, impl="chunked"), fullgraph=True, backend="aot_eager")
    for n in (10, 15, 20):
        z = projections(n, 16)
        x = torch.tensor(z, dtype=torch.float32, requires_grad=True)
        step(x).backward()
        np.testing.assert_allclose(x.grad, oracle.nt_xent_gradient(z, 0.1), atol=1e-6)


def test_operator_is_registered_as_torch_asks():
    z = torch.tensor(projections(6, 8), requires_grad=True)
    library.opcheck(torch.ops.swiftclr.nt_xent.default, (z, 0.1, "chunked", "", "", 1, 0))


# ---------------------------------------------------------------------------------------------------- choice and errors


def test_auto_names_its_choice_and_its_reason():
    assert resolve("auto", "cpu") == ("chunked", "tiles of the matrix, none stored; z is on cpu")
    assert resolve("auto", "cpu", rows=2) == ("reference", "stores the matrix; 2 rows are too few for tiles to pay")
    name, reason = resolve("auto", "cpu", temperature=0.005)
    assert name == "reference"
    assert "0.005 < 0.0128" in reason


def test_below_the_range_of_fp32_auto_stays_exact():
    z = projections(50, 64)
    loss, dz = errors(*run(z, 0.004, "auto"), z, 0.004)
    assert loss < fp32_margin(64, 0.004)
    assert dz < fp32_margin(64, 0.004)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "chunked", "temperature": 0.01}, 'use impl="reference"'),
        ({"impl": "chunked", "operands": "tf32"}, "not tf32"),
        ({"impl": "reference", "operands": "bf16"}, "leave operands out"),
        ({"impl": "triton"}, "needs a CUDA GPU"),
        ({"impl": "fused"}, "got 'fused'"),
        ({"operands": "fp16"}, "cannot run on cpu"),
        ({"temperature": 0.0}, "temperature"),
        ({"rows": 7}, r"\(7, 8\)"),
        ({"rows": 0}, r"\(0, 8\)"),
        ({"dtype": torch.int64}, "floating"),
    ],
)
def test_what_cannot_run_is_refused_with_a_way_out(options, message):
    options = dict(options)
    z = torch.ones(options.pop("rows", 4), 8, dtype=options.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        nt_xent(z, options.pop("temperature", 0.1), **options)


def test_reference_is_the_mean_over_rows_and_not_the_authors_sum_of_two_means():
    """At chance, all rows alike, each row picks one of 2n - 1."""
    assert math.isclose(reference(torch.ones(10, 4), 0.1).item(), math.log(9), rel_tol=1e-6)
