"""NT-Xent in tiles: cut small they add up, on any number of threads alike, and no matrix is stored."""

import threading

import numpy as np
import pytest
import torch

from benchmarks.measure import peak_extra_mib
from model import nt_xent_tiles
from model.nt_xent import nt_xent
from model.nt_xent_rows import unit_rows
from tests.oracles import nt_xent as oracle
from tests.test_nt_xent import errors, fp32_margin, projections, run


def test_many_tiles_and_ragged_ones_add_up(monkeypatch):
    """Tiles of every kind, cut small: on and off the diagonals, square and not."""
    monkeypatch.setattr(nt_xent_tiles, "TILE_ON_CPU", 24)
    z = projections(257, 64)
    loss, dz = errors(*run(z, 0.1, "chunked"), z, 0.1)
    assert loss < fp32_margin(64, 0.1)
    assert dz < fp32_margin(64, 0.1)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 0.5])
def test_bf16_products_err_as_far_as_rounded_operands(temperature):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor does not multiply bf16")
    before = torch.backends.mkldnn.matmul.fp32_precision
    z = projections(257, 128)
    allowed = errors(*oracle.rounded(z, temperature, oracle.to_mantissa(7)), z, temperature)
    actual = errors(*run(z, temperature, "chunked", operands="bf16"), z, temperature)
    assert actual[0] < 1.5 * allowed[0] + fp32_margin(128, temperature)
    assert actual[1] < 1.5 * allowed[1] + fp32_margin(128, temperature)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_chunked_is_bitwise_repeatable_on_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(nt_xent_tiles, "TILE_ON_CPU", 64)
    z = projections(300, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 3, 3):
            torch.set_num_threads(count)
            results.append(run(z, 0.1, "chunked"))
    finally:
        torch.set_num_threads(threads)
    for loss, dz in results[1:]:
        assert loss == results[0][0]
        assert (dz == results[0][1]).all()


def test_chunked_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    run(projections(600, 16), 0.1, "chunked")
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *seen] == [before, before]


def test_an_error_in_one_tile_reaches_the_caller(monkeypatch):
    """And does not leave the tiles that follow it waiting."""
    monkeypatch.setattr(nt_xent_tiles._caller, "num_threads", 3)
    u, _ = unit_rows(torch.tensor(projections(1500, 8)))

    def fail(*_tile):
        raise MemoryError("no room for this tile")

    with pytest.raises(MemoryError, match="no room"):
        nt_xent_tiles.add_tiles(torch.zeros(3000), u, 0, 0.1, "", fail)


def test_chunked_stores_no_matrix():
    """Extra memory at 8192 rows stays below a quarter of one fp32 matrix, of which the reference keeps several."""
    z = torch.randn(8192, 128, requires_grad=True)
    step = lambda: nt_xent(z, 0.1, impl="chunked").backward()  # noqa: E731
    step()
    assert peak_extra_mib(step, "cpu") < 256 / 4


def test_other_memory_layouts_give_the_same():
    z = projections(37, 24)
    plain = run(z, 0.1, "chunked")
    x = torch.tensor(z.T.copy(), dtype=torch.float32, requires_grad=True)
    loss = nt_xent(x.T, 0.1, impl="chunked")
    (3 * loss).backward()
    assert loss.item() == plain[0]
    np.testing.assert_allclose(x.grad.T, 3 * plain[1], rtol=1e-6)
