"""NT-Xent between ranks: several processes with gloo must compute what one process computes.

One spawn of four processes serves all world sizes, each as a group of the first ranks.
"""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import nt_xent_tiles
from model.nt_xent import nt_xent
from tests.oracles import nt_xent as oracle
from tests.test_nt_xent import fp32_margin, projections

WORLD_SIZES = [1, 2, 3, 4]
IMAGES, DIM, TEMPERATURE = 9, 24, 0.1  # images per rank
VARIANTS = [
    ("reference", "float64", None),
    ("reference", "float32", None),
    ("chunked", "float64", None),
    ("chunked", "float32", None),
    ("triton", "float32", "fp32"),
    ("triton", "float32", "fp16"),
]


def batch(world_size: int) -> torch.Tensor:
    """(2, images, DIM): both views of all images, in float64."""
    return torch.tensor(projections(IMAGES * world_size, DIM)).view(2, -1, DIM)


def layer(dtype: torch.dtype) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(DIM, DIM, bias=False).to(dtype)


def rank_main(rank: int, folder: str) -> None:
    """Writes, per world size and variant, the mean over ranks of the loss, and dz and dW as DDP averages them."""
    warnings.filterwarnings("error", message=".*deprecated", category=FutureWarning)
    torch.set_num_threads(1)  # four processes share few cores
    nt_xent_tiles.TILE_ON_CPU = 8
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(WORLD_SIZES))
    results = {}
    for world_size in WORLD_SIZES:
        group = dist.new_group(list(range(world_size)))
        if rank >= world_size:
            continue
        for impl, dtype, operands in VARIANTS:
            images = batch(world_size)[:, rank * IMAGES : (rank + 1) * IMAGES].reshape(-1, DIM)
            model = DistributedDataParallel(layer(getattr(torch, dtype)), process_group=group)
            z = model(images.to(getattr(torch, dtype)))
            z.retain_grad()
            loss = nt_xent(z, TEMPERATURE, group=group, impl=impl, operands=operands)
            loss.backward()
            losses = [torch.zeros_like(loss) for _ in range(world_size)]
            dist.all_gather(losses, loss.detach(), group=group)
            pieces = [torch.zeros_like(z) for _ in range(world_size)]
            dist.all_gather(pieces, z.grad, group=group)
            views = torch.stack([piece.view(2, IMAGES, DIM) for piece in pieces], 1)  # view, rank, image
            results[world_size, impl, dtype, operands] = (
                torch.stack(losses).mean().item(),
                views.reshape(-1, DIM) / world_size,
                model.module.weight.grad,
            )
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder: Path = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # for the children, before any of them imports Triton
        torch.multiprocessing.spawn(rank_main, (str(folder),), nprocs=max(WORLD_SIZES))
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("impl", "dtype", "operands"), VARIANTS)
def test_ranks_agree_with_one_process(results, world_size, impl, dtype, operands):
    loss, dz, dw = results[world_size, impl, dtype, operands]
    x = batch(world_size).reshape(-1, DIM)
    linear = layer(torch.float64 if dtype == "float64" else torch.float32)
    z = linear(x.to(linear.weight.dtype))
    z.retain_grad()
    alone = nt_xent(z, TEMPERATURE, impl="reference")
    alone.backward()
    # Half-precision operands are held to what rounding them costs, the rest to the 1e-12 and 1e-6.
    tolerance = {"float64": 1e-12, "float32": 1e-6}[dtype]
    if operands == "fp16":
        exact = z.detach().double().numpy()
        _, cost = oracle.rounded(exact, TEMPERATURE, oracle.to_fp16)
        true = oracle.nt_xent_gradient(exact, TEMPERATURE)
        tolerance = 1.5 * np.abs(cost - true).max() / np.abs(true).max() + fp32_margin(DIM, TEMPERATURE)
    assert z.grad is not None
    assert abs(loss - alone.item()) <= tolerance * abs(alone.item())
    assert (dz - z.grad).abs().max() <= tolerance * z.grad.abs().max()
    assert linear.weight.grad is not None
    assert (dw - linear.weight.grad).abs().max() <= 2 * tolerance * linear.weight.grad.abs().max()
