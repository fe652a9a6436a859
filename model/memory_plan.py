"""What fits: how a batch goes through a device, in micro-batches of which some keep their activations.

    plan(model, images, like) -> Plan(micro_batch, count, keep, offload)

The fields are what `large_batch.backward` takes. On a GPU they are measured, on a CPU they are what was asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

ROOM = 0.8  # of the free GPU memory; the rest is for the optimizer's state, the loss and the image pipeline
FEW = 32  # images in a micro-batch: with fewer a GPU idles, and a BatchNorm's statistics are poor
NO_ROOM = ("out of memory", "ALLOC_FAILED", "unable to find an engine", "Unable to find a valid cuDNN algorithm")


@dataclass(frozen=True)
class Plan:
    """How a batch goes through a device; see `plan`. The fields are those of `backward`, and images per micro-batch."""

    micro_batch: int
    count: int
    keep: int
    offload: bool

    def __str__(self) -> str:
        return (
            f"{self.count * self.micro_batch} per process"
            + (f" in {self.count} micro-batches of {self.micro_batch}" if self.count > 1 else "")
            + (f", {self.count - self.keep} of them encoded twice" if self.count > self.keep else "")
            + (", waiting on the host" if self.offload else "")
        )


def plan(
    model: nn.Module,
    images: int,
    like: Tensor,
    *,
    micro_batch: int = 0,
    keep: int = 0,
    agree: Callable[[int], int] = int,
) -> Plan:
    """What fits: the largest micro-batch that divides `images`, and as many kept graphs as there is room for.

    A few images are measured first; sizes that cannot fit by them, and those above `most_images`, are not tried.

    model        not wrapped by DDP, on its device; it is run with zeros and left as it was.
    images       in this process's batch.
    like         (1, 3, S, S), of the views' type and device.
    micro_batch  a divisor of `images`; 0 tries all of them, largest first. On a CPU, which cannot say what fits, 0 is
                 `images`.
    keep         0 fills the memory that is left; on a CPU it is 1.
    agree        takes a number of this process and gives the smallest of all processes; all call it equally often.
    ValueError where `micro_batch`, or a single image, does not fit, or `micro_batch` is above `most_images`; and where
    FEW images would fit, but of the divisors only one less than half of that: a prime factor of `images` would make the
    micro-batches tiny.
    """
    if like.device.type != "cuda":
        micro_batch = micro_batch or images
        return Plan(micro_batch, images // micro_batch, min(keep or 1, images // micro_batch), offload=False)

    bound = most_images(model, like)
    if micro_batch > bound:
        raise ValueError(
            f"--micro-batch {micro_batch}: expected at most {bound} of {tuple(like.shape[1:])}, so that the largest "
            f"activation of this encoder has fewer than 2^31 elements, which is as far as CUDA kernels count"
        )
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(like.device)[0]
    room = int(ROOM * free)
    views = 2 * images * like.numel() * like.element_size()
    offload = views > room // 4
    room -= 0 if offload else views
    most = free if micro_batch else room

    def measure(size: int) -> tuple[int, int] | None:
        # Twice: in the first run of a size the libraries hold what they try out.
        return _needs(model, size, like, most) and _needs(model, size, like, most)

    sizes = [micro_batch] if micro_batch else divisors(images)
    few = min(FEW, sizes[0])
    needs = measure(few)
    # A graph grows with the images, except for its half-precision copies of weights; a run needs more than its graph.
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    likely = agree(max(few, most * few // max(1, needs[1] - weights)) if needs else few - 1)
    for candidate in sizes:
        if candidate > min(likely, bound):
            continue
        needs = needs if candidate == few else measure(candidate)
        if agree(needs is not None):
            break
    else:
        raise ValueError(
            f"{candidate} image(s) of {tuple(like.shape[1:])} in one micro-batch do not fit the {most >> 20} MiB that "
            f"are free on {like.device}; give a smaller --micro-batch or a smaller encoder"
        )
    assert needs is not None
    if not micro_batch and 2 * candidate < FEW == few <= likely:  # divisors are missing, not memory
        above = next(size for size in reversed(sizes) if size > FEW)
        raise ValueError(
            f"{images} images per process divide into micro-batches of {above}, which do not fit {like.device}, or of "
            f"{candidate}, though {FEW} would fit: choose a --batch-size that gives each process "
            f"{round(images / FEW) * FEW}, or insist with --micro-batch {candidate}"
        )
    peak, graph = needs
    count = images // candidate
    fitting = agree(min(count, 1 + max(0, room - peak) // graph))
    return Plan(candidate, count, min(keep, count) or fitting, offload and count > 1)


def most_images(model: nn.Module, like: Tensor) -> int:
    """The most images in a micro-batch for which every activation has fewer than 2^31 elements.

    With more, kernels that count in 32 bits write to wrong places, and the CUDA context ends with an error that does
    not say why (pytorch/pytorch#117736). Found by running one view on the meta device, which computes shapes alone.
    """
    largest = like[0].numel()

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, output.numel() if isinstance(output, Tensor) else 0)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    training = model.training
    model.eval()
    try:
        shapes = {name: t.to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
        dtype = next((param.dtype for param in model.parameters()), torch.float32)  # autocast overlooks meta tensors
        with torch.no_grad():
            functional_call(model, shapes, (torch.empty(1, *like.shape[1:], dtype=dtype, device="meta"),))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return (2**31 - 1) // (2 * largest)


def divisors(number: int) -> list[int]:
    """Largest first."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]


def _needs(model: nn.Module, images: int, like: Tensor, room: int) -> tuple[int, int] | None:
    """A micro-batch's peak bytes, and those that its graph holds after the forward; None if `room` is too small."""
    device = like.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before, total = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(device) + room) / total), device)
    training = model.training
    model.eval()  # as large as in training, but statistics stay and SyncBatchNorm does not wait for other processes
    try:
        views = like.new_zeros(2 * images, *like.shape[1:]).contiguous(memory_format=torch.channels_last)
        z = model(views)
        graph = torch.cuda.memory_allocated(device) - before
        z.backward(torch.zeros_like(z))
        return torch.cuda.max_memory_allocated(device) - before, graph
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:  # cuDNN and cuBLAS raise it without room to work in, and when they are broken
        if images == 1 or not any(words in str(error) for words in NO_ROOM):
            raise
        return None
    finally:
        model.zero_grad()
        model.train(training)
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.reset_peak_memory_stats(device)
