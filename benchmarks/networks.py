"""The networks that the ablation trains: the papers', and two without batch norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from few_shot import conv_net

NETWORKS = ("conv4", "conv4-groupnorm", "vit")
PATCH, WIDTH, DEPTH, HEADS = 8, 64, 3, 4
GROUPS = 8


def make(
    name: str, channels: int, ways: int, filters: int, size: int | tuple[int, int]
) -> nn.Module:
    """Returns a network.

    Args:
        name: one of ``NETWORKS``.
        channels: of the images.
        ways: classes to tell apart.
        filters: channels of every block of a convolutional one.
        size: height and width of the images, or one number for both.
    """
    if name == "vit":
        return ViT(channels, ways, size)
    net = conv_net(channels, ways, filters, size)
    if name == "conv4-groupnorm":
        for child, layer in net.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                net.add_module(child, nn.GroupNorm(GROUPS, filters))
    return net


class ViT(nn.Module):
    """A small vision transformer: 3 blocks of width 64 on patches of 8x8, mean over patches.

    Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; its blocks are torch's encoder
    layers, with the norm before attention and feed-forward.
    """

    def __init__(self, channels: int, ways: int, size: int | tuple[int, int]) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        self.patches = nn.Conv2d(channels, WIDTH, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.02 * torch.randn(height // PATCH * (width // PATCH), WIDTH))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    *(WIDTH, HEADS, 2 * WIDTH),
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(DEPTH)
            )
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits [N, ways] of images [N, channels, height, width]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(tokens)).mean(1))
