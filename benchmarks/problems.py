"""The networks and tasks of the speed benchmarks. The loops are those of mamlpp_ext.benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_ext.benchmark.question import Question


def convolutional(
    ways: int,
    filters: int = 64,
    blocks: int = 4,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    """Blocks for inputs [N, 1, S, S], of which each halves S, to 1 in the end.

    The network of the papers on Omniglot has four, for images of 28x28.
    """
    layers: list[nn.Module] = []
    for channels in (1, *[filters] * (blocks - 1)):
        conv = nn.Conv2d(channels, filters, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(filters), activation(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters, ways))


def mlp(ways: int = 5, width: int = 64) -> nn.Module:
    """Two hidden layers with batch norm, for inputs [N, 20]."""
    hidden = [(20, width), (width, width)]
    layers = [(nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()) for i, o in hidden]
    return nn.Sequential(*[layer for triple in layers for layer in triple], nn.Linear(width, ways))


class ResidualBlock(nn.Module):
    """Three convolutions beside a 1x1 one, then pooling: a quarter of a ResNet-12."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for source in (channels, filters, filters):
            conv = nn.Conv2d(source, filters, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(filters), nn.LeakyReLU(0.1)]
        self.body = nn.Sequential(*layers[:-1])
        self.skip = nn.Sequential(
            nn.Conv2d(channels, filters, 1, bias=False), nn.BatchNorm2d(filters)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.leaky_relu(self.body(x) + self.skip(x), 0.1), 2)


def resnet12(ways: int = 5, widths: tuple[int, ...] = (64, 128, 256, 512)) -> nn.Module:
    """ResNet-12 as few-shot papers use it on Mini-ImageNet, for inputs [N, 3, 84, 84]."""
    blocks = map(ResidualBlock, (3, *widths), widths)
    head = nn.Linear(widths[-1], ways)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


conv3 = partial(convolutional, 5, 32, blocks=3)
conv4_5way, conv4_20way = partial(convolutional, 5), partial(convolutional, 20)
conv4_16, conv4_32, conv4_128, conv4_256 = (
    partial(convolutional, 5, filters) for filters in (16, 32, 128, 256)
)
mlp_300, mlp_1000, mlp_3150 = (partial(mlp, 5, width) for width in (300, 1000, 3150))
# The authors' network has leaky units.
conv4_leaky = partial(convolutional, 5, activation=nn.LeakyReLU)

PROBLEMS = {
    "Conv4-64 5-way": Question("problems:conv4_5way", (1, 28, 28), ways=5),
    "Conv4-64 20-way": Question("problems:conv4_20way", (1, 28, 28), ways=20),
    "MLP": Question("problems:mlp", (20,), ways=5),
    "Conv3-32 at 8x8": Question("problems:conv3", (1, 8, 8), ways=5),
    "ResNet-12": Question("problems:resnet12", (3, 84, 84), ways=5, tasks=1),
}
# Of growing size: the same tasks, and networks by their filters or parameters.
BY_FILTERS = {
    filters: replace(PROBLEMS["Conv4-64 5-way"], model=f"problems:{name}")
    for filters, name in (
        (16, "conv4_16"),
        (32, "conv4_32"),
        (64, "conv4_5way"),
        (128, "conv4_128"),
        (256, "conv4_256"),
    )
}
BY_PARAMETERS = {
    count: replace(PROBLEMS["MLP"], model=f"problems:{name}")
    for count, name in (
        (6_085, "mlp"),
        (99_305, "mlp_300"),
        (1_031_005, "mlp_1000"),
        (10_020_155, "mlp_3150"),
    )
}
