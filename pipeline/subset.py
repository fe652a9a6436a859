"""A part of a data set: the same tars under shorter indexes, so that it costs a line per sample and copies no image.

What an index lists is read and nothing else, so training on 1 % of ImageNet reads 1 % of it.
Fine-tuning on few labels needs this: Chen et al. 2020, arXiv:2002.05709, section 5 and appendix B.5.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.shards import Dataset, DatasetError, index_text, members

Positions = NDArray[np.int64]  # places of samples in the order of the shards, counted from 0


@dataclass(frozen=True, kw_only=True)
class Subset(Dataset):
    """A `Dataset` whose indexes are not those beside its tars."""

    texts: dict[str, bytes]  # the index of each shard, by its file

    def index_contents(self, shards: Sequence[int]) -> list[bytes]:
        return [self.texts[self.shards[shard].file] for shard in shards]


def keys(dataset: Dataset) -> list[str]:
    """The key of every sample, in the order of the shards."""
    return [members(line)[0].key for lines in _index_lines(dataset) for line in lines]


def stratified(labels: Positions, share: float, seed: int) -> Positions:
    """`share` (0 … 1) of every class, rounded, but at least one sample of each; ascending positions.

    Drawn by `seed`; what a smaller share takes a larger one takes too. Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of the labels must lie above 0 and up to 1, got {share}")
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(labels))
    chosen = [places[: max(1, round(share * len(places)))] for places in _by_class(labels[order])]
    return np.sort(order[np.concatenate(chosen)])


def named(dataset: Dataset, names: Iterable[str]) -> Positions:
    """Where the samples are that were made from files of these names, as in the authors' lists; ascending positions.

    A name is a key, or a file name whose stem is part of one (n01440764_10026.JPEG); folders before it and empty lines
    are passed over. Raises DatasetError naming what is missing or fits several samples.
    """
    places: dict[str, list[int]] = {}
    for i, key in enumerate(keys(dataset)):
        for name in {key, key.partition("-")[2]}:  # the writer puts the position before the file's stem
            places.setdefault(name, []).append(i)
    found: dict[str, list[int]] = {}
    for name in filter(None, map(str.strip, names)):
        stem = re.sub("[^A-Za-z0-9_-]+", "_", Path(name).stem)  # as the writer spells it, up to 64 characters of it
        found[name] = places.get(stem) or places.get(stem[:64], [])
    if not found:
        raise DatasetError("the list of names is empty")
    if missing := [name for name, at in found.items() if not at]:
        raise DatasetError(
            f"{len(missing)} of {len(found)} names are not in {dataset.address}: {', '.join(missing[:3])}"
        )
    if several := [name for name, at in found.items() if len(at) > 1]:
        raise DatasetError(
            f"{several[0]} fits several samples of {dataset.address}: list keys (KEY of KEY.cls) instead"
        )
    return np.unique([at[0] for at in found.values()])


def subset(dataset: Dataset, positions: Sequence[int] | Positions) -> Subset:
    """The data set of the samples at `positions` alone, in the order of the shards.

    Its fingerprint is its own. Shards of which nothing is left are left out.
    """
    chosen = set(np.asarray(positions).tolist())
    shards, texts, start = [], {}, 0
    for shard, lines in zip(dataset.shards, _index_lines(dataset), strict=True):
        left = [line for i, line in enumerate(lines, start) if i in chosen]
        start += len(lines)
        if left:
            texts[shard.file] = index_text(left).encode()
            digest = hashlib.sha256(texts[shard.file]).hexdigest()
            shards.append(replace(shard, samples=len(left), index_sha256=digest))
    facts = {field.name: getattr(dataset, field.name) for field in fields(Dataset)}
    facts |= {"shards": tuple(shards), "samples": sum(shard.samples for shard in shards)}
    return Subset(**facts, texts=texts)


def _by_class(labels: Positions) -> list[Positions]:
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def _index_lines(dataset: Dataset) -> list[list[str]]:
    contents = dataset.index_contents(range(len(dataset.shards)))
    return [index.decode("ascii").splitlines()[1:] for index in contents]
