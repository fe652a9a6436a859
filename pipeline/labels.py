"""The labels of data sets: read without their images, and compared where one set judges what another taught."""

import itertools

import numpy as np
from numpy.typing import NDArray

from pipeline.reader import DamagedError, Reader
from pipeline.shards import Dataset, DatasetError
from pipeline.store import is_remote


def labels(dataset: Dataset) -> NDArray[np.int64]:
    """The label (N,) of every sample, in the order of the shards: read from the tars, no image is decoded.

    Raises DatasetError where there are none, or one is not a class.
    """
    reader = Reader(dataset)
    try:
        return reader.labels(np.arange(dataset.samples))
    except DamagedError as error:
        more = f" ({len(error.faults) - 1} more like it)" if len(error.faults) > 1 else ""
        raise DatasetError(
            f"{dataset.address}: {reader.describe(*next(iter(error.faults.items())))}{more}. `python "
            f"tools/make_shards.py verify {dataset.address}` names them all, and `quarantine` leaves them out"
        ) from error


def check_alike(train: Dataset, test: Dataset) -> None:
    """Raises DatasetError where `test` cannot judge what was learned on `train`: other classes, or labels beyond them.

    Labels of object storage are checked as they are read for use.
    """
    if difference := _difference(train, test):
        raise DatasetError(
            f"both sets must be labelled with the same classes, but {difference}; make both from the same class "
            "folders, empty ones included, or with one list of classes (--classes)"
        )
    if not is_remote(test.tars_address):
        labels(test)


def _difference(first: Dataset, second: Dataset) -> str:
    """Why the labels of one data set mean nothing in the other, or "" where they mean the same."""
    for dataset in (first, second):
        if dataset.classes is None:
            return f"{dataset.address} has no labels"
    ours, theirs = first.classes or (), second.classes or ()
    for label, (one, other) in enumerate(itertools.zip_longest(ours, theirs)):
        if one != other:
            names = " and ".join("no class" if name is None else repr(name) for name in (one, other))
            return (
                f"{len(ours)} classes in {first.address} and {len(theirs)} in {second.address}; label {label} is "
                f"{names}, in this order"
            )
    return ""
