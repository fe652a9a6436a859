"""Sizes at which the mathematics of a step is void, refused by name before anything is trained."""


def check_statistics(images: int, change: str) -> None:
    """Raises ValueError where BatchNorm would take its statistics from a single image.

    In training mode it then leaves of each channel nothing that tells images apart, and without pixels nothing at all.

    images  of a process that go through the network at once; over all processes where they share the statistics.
    change  what the caller is to do.
    """
    if images < 2:
        raise ValueError(f"BatchNorm takes its statistics from {images} image at a time, expected at least 2: {change}")


def check_contrast(images: int, dim: int | None = None) -> None:
    """Raises ValueError where NT-Xent has nothing to tell apart.

    images  of a step over all processes: one has no negatives, and its loss is 0 whatever the weights.
    dim     columns of z, None if they are those of the features: on one axis every z is as far as 1 or -1.
    """
    if images < 2:
        raise ValueError(f"NT-Xent has no negatives in a batch of {images} image, expected at least 2: --batch-size")
    if dim is not None and dim < 2:
        raise ValueError(f"z of {dim} column is 1 or -1 once it has unit length, expected at least 2: --projection-dim")
