"""One ResNet, many key names: what others call the weights that torchvision calls conv1, layer1.0.bn1, fc.

Strings only. torchvision and timm agree; what others add is a prefix (`backbone.`, `encoder.`, `module.`), and
sometimes torchvision's children in a bare Sequential (`0.weight` is conv1, `4.0.conv1.weight` layer1.0.conv1) or
`shortcut` for `downsample`. Around the encoder a training checkpoint holds a head, a classifier and perhaps a momentum
copy of it all. Read in lightly 1.6.0 (models/resnet.py, its tutorials) and solo-learn (methods/base.py).
"""

import re
from collections.abc import Collection
from typing import Literal

Names = Literal["torchvision", "timm", "lightly", "solo-learn"]

# Positions of the children in a Sequential: of torchvision's ResNet, and of lightly's, which has ReLU and pooling in
# forward().
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_LIGHTLY_CHILDREN = {"0": "conv1", "1": "bn1", "2": "layer1", "3": "layer2", "4": "layer3", "5": "layer4"}
_COPY = re.compile(r"(^|[._])(momentum|teacher|target|ema|key|k)([._]|$)")  # in the prefix of a second encoder


def to_torchvision(keys: Collection[str]) -> dict[str, str]:
    """{key in the file: torchvision's key} of the one ResNet encoder among `keys`; fc, heads and copies are left out.

    Raises ValueError if there is none, or more than one that is not a momentum copy.
    """
    named = re.compile(r"(.*\.|)layer1\.0\.conv1\.weight")
    prefixes: dict[str, dict[str, str] | None] = {match[1]: None for match in map(named.fullmatch, keys) if match}
    numbered = {key.removesuffix("0.weight") for key in keys if re.search(r"(^|\.)0\.weight$", key)}
    prefixes |= {p: _LIGHTLY_CHILDREN for p in numbered if f"{p}2.0.conv1.weight" in keys}
    prefixes |= {p: _CHILDREN for p in numbered - prefixes.keys() if f"{p}4.0.conv1.weight" in keys}
    encoders = sorted(prefix for prefix in prefixes if not _COPY.search(prefix)) or sorted(prefixes)
    if len(encoders) != 1:
        number = f"several: {', '.join(map(repr, encoders))}" if encoders else f"none among {sorted(keys)[:3]} ..."
        raise ValueError(f"expected one ResNet under torchvision's, timm's, lightly's or solo-learn's names; {number}")
    prefix, children = encoders[0], prefixes[encoders[0]]
    renamed: dict[str, str] = {}
    for key in keys:
        first, _, rest = key.removeprefix(prefix).partition(".")
        first = first if children is None else children.get(first, "")
        if key.startswith(prefix) and re.fullmatch(r"conv1|bn1|layer[1-4]", first):
            renamed[key] = f"{first}.{rest}".replace(".shortcut.", ".downsample.")
    return renamed


def from_torchvision(key: str, names: Names) -> str:
    """What an encoder's weight is called elsewhere: timm agrees, solo-learn prefixes, lightly numbers the children."""
    if names == "solo-learn":
        return f"backbone.{key}"
    if names == "lightly":
        first, _, rest = key.partition(".")
        return f"backbone.{next(number for number, child in _CHILDREN.items() if child == first)}.{rest}"
    return key
