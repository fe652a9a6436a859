"""The encoder f: torchvision's residual networks without their classifier.

torchvision's blocks in torchvision's order under torchvision's key names, so a state dict moves between the two
unchanged. What differs is SimCLR's: every channel count times `width` (the stem's too), the stem for small images,
γ = 0 in the last BatchNorm of each block, the authors' draw of the convolutions, and SimCLRv2's selective kernels.
He et al. 2015, arXiv:1512.03385; Chen et al. 2020, arXiv:2002.05709 and 2006.10029, and the authors' resnet.py.
"""

import math
from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn
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
    selective_kernel: bool
    num_features: int


class SelectiveKernel(nn.Module):
    """Two 3x3 convolutions, and for every image and channel a softmax that says how much of each counts.

    (n, C, H, W) -> (n, C, H / stride, W / stride), not negative. Li et al. 2019, arXiv:1903.06586, in the form of
    SimCLRv2: both kernels are 3x3, held as one convolution, and what weighs them passes through C / 16 channels, or 32.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        squeezed = max(channels // 16, 32)
        self.split = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(inplace=True),
        )
        self.select = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1, bias=False),
            nn.BatchNorm2d(squeezed),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed, 2 * channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.split(x).chunk(2, 1)
        a, b = self.select(first + second).chunk(2, 1)
        return torch.lerp(second, first, (a - b).sigmoid())  # a softmax of two, in the type of the streams


class StridedPointwise(nn.Conv2d):
    """A 1x1 convolution of a stride, without bias, as one of stride 1 on the pixels that it keeps.

    Below 16 channels in, on AVX2 below 8, oneDNN's gradient of the other writes past its workspace where memory is
    channels_last: wrong gradients, or a crash (uxlfoundation/oneDNN#6035, in torch 2.14).
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return nn.functional.conv2d(x[..., ::rows, ::columns], self.weight)


class UpperLeftPool(nn.AvgPool2d):
    """The mean of a pixel and its three neighbours to the right and below, at the edges of those that exist."""

    def __init__(self) -> None:
        super().__init__(2, 1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 1:, 1:]


def build_encoder(
    depth: int = 50, *, width: float = 1, stem: Stem = "standard", selective_kernel: bool = False
) -> Encoder:
    """A freshly drawn ResNet encoder.

    depth  18, 34, 50, 101 or 152.
    width  multiplies all channels: 1, 2 or 4 in the paper (24, 94 and 375 M parameters at depth 50). Fractions
           serve small demonstrations; 64 * width must be a whole number.
    stem   "standard" is 7x7, stride 2, then max-pool. "small" is 3x3, stride 1, no pool: the authors use it up to
           32 px, SwiftCLR up to 64 px.
    selective_kernel  SimCLRv2's blocks, from depth 50 on (35 M parameters at depth 50): SelectiveKernel for the 3x3
           convolution, and ResNet-D's shortcuts and standard stem (arXiv:1812.01187), as the authors tie the two.
    BatchNorm keeps torch's momentum 0.1 and eps 1e-5, the authors' decay 0.9 and 1e-5. Raises ValueError.
    """
    if depth not in LAYERS:
        raise ValueError(f"depth {depth!r} is not a ResNet: choose one of {', '.join(map(str, LAYERS))}")
    if not 0 < width <= 16 or not float(64 * width).is_integer():
        raise ValueError(f"width {width!r}: 64 * width must be a whole number of channels, width between 1/64 and 16")
    if stem not in ("standard", "small"):
        raise ValueError(f'stem {stem!r} is neither "standard" nor "small"')
    if selective_kernel and depth < 50:
        raise ValueError(f"selective_kernel: depth {depth} has no bottleneck blocks to put it in; 50, 101 and 152 have")

    block: type[BasicBlock] | type[Bottleneck] = BasicBlock if depth < 50 else Bottleneck
    channels = int(64 * width)
    small = stem == "small"
    chain: list[tuple[str, nn.Module]] = [
        ("conv1", _stem(channels, small, selective_kernel)),
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
            downsample = _shortcut(inplanes, outplanes, stride, selective_kernel)
        blocks = [
            block(inplanes, planes, stride, downsample),
            *(block(outplanes, planes) for _ in range(1, num_blocks)),
        ]
        if selective_kernel:
            for j, bottleneck in enumerate(blocks):  # its output is not negative, so the ReLU behind it does nothing
                bottleneck.conv2 = SelectiveKernel(planes, stride if j == 0 else 1)  # type: ignore[assignment]
                bottleneck.bn2 = nn.Identity()  # type: ignore[assignment]
        chain.append((f"layer{i + 1}", nn.Sequential(*blocks)))
        inplanes = outplanes
    chain += [("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Identity())]

    encoder = Encoder(OrderedDict(chain))
    encoder.depth, encoder.width, encoder.stem, encoder.num_features = depth, width, stem, inplanes
    encoder.selective_kernel = selective_kernel
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


def _stem(channels: int, small: bool, selective_kernel: bool) -> nn.Module:
    if small:
        return nn.Conv2d(3, channels, 3, 1, 1, bias=False)
    if not selective_kernel:
        return nn.Conv2d(3, channels, 7, 2, 3, bias=False)
    half = channels // 2
    return nn.Sequential(
        *(nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True)),
        *(nn.Conv2d(half, half, 3, 1, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(inplace=True)),
        nn.Conv2d(half, channels, 3, 1, 1, bias=False),
    )


def _shortcut(inplanes: int, outplanes: int, stride: int, selective_kernel: bool) -> nn.Sequential:
    if not selective_kernel:
        convolution = StridedPointwise if inplanes < 16 else nn.Conv2d
        return nn.Sequential(convolution(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))
    # Beyond an odd edge the authors count zeros where they halve, and nothing where they do not.
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=4) if stride == 2 else UpperLeftPool()
    return nn.Sequential(pool, nn.Conv2d(inplanes, outplanes, 1, bias=False), nn.BatchNorm2d(outplanes))
