"""The encoder f: torchvision's residual networks without their classifier.

torchvision's blocks in torchvision's order under torchvision's key names, so a state dict moves between the two
unchanged. What differs is SimCLR's: every channel count times `width` (the stem's too), the stem for small images,
γ = 0 in the last BatchNorm of each block, and the authors' draw of the convolutions.
He et al. 2015, arXiv:1512.03385; Chen et al. 2020, arXiv:2002.05709, and the authors' resnet.py.
"""

import math
from collections import OrderedDict
from typing import Literal

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

Stem = Literal["standard", "small"]

LAYERS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Encoder(nn.Sequential):
    """A chain conv1, bn1, relu, maxpool, layer1 … layer4, avgpool, flatten, fc, with the facts that built it.

    images (n, 3, S, S) -> features (n, num_features). `fc` is the identity, there to be replaced for fine-tuning.
    """

    depth: int
    width: float
    stem: Stem
    num_features: int


def build_encoder(depth: int = 50, *, width: float = 1, stem: Stem = "standard") -> Encoder:
    """A freshly drawn ResNet encoder.

    depth  18, 34, 50, 101 or 152.
    width  multiplies all channels: 1, 2 or 4 in the paper (24, 94 and 375 M parameters at depth 50). Fractions
           serve small demonstrations; 64 * width must be a whole number.
    stem   "standard" is 7x7, stride 2, then max-pool. "small" is 3x3, stride 1, no pool: the authors use it up to
           32 px, SwiftCLR up to 64 px.
    BatchNorm keeps torch's momentum 0.1 and eps 1e-5, the authors' decay 0.9 and 1e-5. Raises ValueError.
    """
    if depth not in LAYERS:
        raise ValueError(f"depth {depth!r} is not a ResNet: choose one of {', '.join(map(str, LAYERS))}")
    if not 0 < width <= 16 or not float(64 * width).is_integer():
        raise ValueError(f"width {width!r}: 64 * width must be a whole number of channels, width between 1/64 and 16")
    if stem not in ("standard", "small"):
        raise ValueError(f'stem {stem!r} is neither "standard" nor "small"')

    block: type[BasicBlock] | type[Bottleneck] = BasicBlock if depth < 50 else Bottleneck
    channels = int(64 * width)
    small = stem == "small"
    chain: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, channels, *((3, 1, 1) if small else (7, 2, 3)), bias=False)),
        ("bn1", nn.BatchNorm2d(channels)),
        ("relu", nn.ReLU(inplace=True)),
        ("maxpool", nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)),
    ]
    inplanes = channels
    for i, num_blocks in enumerate(LAYERS[depth]):
        planes, stride = channels * 2**i, 1 if i == 0 else 2
        outplanes = planes * block.expansion
        downsample = None
        if stride != 1 or inplanes != outplanes:
            downsample = nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))
        blocks = [
            block(inplanes, planes, stride, downsample),
            *(block(outplanes, planes) for _ in range(1, num_blocks)),
        ]
        chain.append((f"layer{i + 1}", nn.Sequential(*blocks)))
        inplanes = outplanes
    chain += [("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Identity())]

    encoder = Encoder(OrderedDict(chain))
    encoder.depth, encoder.width, encoder.stem, encoder.num_features = depth, width, stem, inplanes
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            # TensorFlow's variance_scaling_initializer(): a normal cut at two sigma, widened so that what is left has
            # variance 1 / fan_in (half of torchvision's). By inverse distribution: torch's trunc_normal_ draws again
            # and again until every entry fits, ten times slower.
            sigma = module.weight[0].numel() ** -0.5 / 0.87962566103423978
            with torch.no_grad():
                module.weight.uniform_(-math.erf(2**0.5), math.erf(2**0.5)).erfinv_().mul_(2**0.5 * sigma)
        elif isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)
        elif isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)
    return encoder
