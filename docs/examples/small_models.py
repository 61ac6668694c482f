"""A model of today, small enough for handwritten digits: a ConvNeXt."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, LayerNorm over channels, two linear layers; added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.depthwise(x).movedim(1, -1))
        return x + self.narrow(nn.functional.gelu(self.wide(rows))).movedim(-1, 1)


def conv_next(ways: int, width: int = 32) -> nn.Module:
    """Returns a ConvNeXt of two blocks, for [N, 1, 8, 8]."""
    stem = nn.Conv2d(1, width, 2, stride=2)
    blocks = [ConvNeXtBlock(width) for _ in range(2)]
    head = nn.LayerNorm(16 * width), nn.Linear(16 * width, ways)
    return nn.Sequential(stem, *blocks, nn.Flatten(), *head)
