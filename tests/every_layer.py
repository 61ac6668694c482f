"""Every layer of ``torch.nn``, small: how to make one, and what to call it with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from any_model import TASKS, Batch

# Bases, containers and wrappers: nothing that is called with a tensor by itself.
NO_LAYERS = {
    "Container": "a base",
    "DataParallel": "a wrapper",
    "Module": "a base",
    "ModuleDict": "a container",
    "ModuleList": "a container",
    "ParameterDict": "a container",
    "ParameterList": "a container",
    "RNNBase": "a base",
    "RNNCellBase": "a base",
    "Sequential": "a container",
}

Inputs = Callable[[], tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A layer and the inputs of one task.

    Attributes:
        make: the layer.
        inputs: of a task; the first, if it is of floats, is scaled by a learned vector.
    """

    make: Callable[[], nn.Module]
    inputs: Inputs


class Around(nn.Module):
    """A layer behind something that is adapted, so that its own gradient is differentiated, too."""

    def __init__(self, layer: nn.Module, example: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.layer = layer
        first = example[0]
        size = first.shape[-1] if first.is_floating_point() else 1
        self.scale = nn.Parameter(torch.linspace(0.8, 1.2, size))

    def forward(self, first: Tensor, *others: Tensor) -> Any:
        if first.is_floating_point():
            first = first * self.scale
        return self.layer(first, *others)


def floats(*shape: int) -> Inputs:
    return lambda: (torch.randn(*shape),)


def positive(*shape: int) -> Tensor:
    return torch.rand(*shape) * 0.8 + 0.1


def indices(count: int, *shape: int) -> Tensor:
    return torch.randint(count, shape)


def signs(*shape: int) -> Tensor:
    return torch.randint(2, shape) * 2.0 - 1


def each(names: str, make: Callable[[Any], nn.Module], inputs: Inputs) -> dict[str, Recipe]:
    return {n: Recipe(lambda n=n: make(getattr(nn, n)), inputs) for n in names.split()}


def in_dimensions(
    name: str, make: Callable[[Any], nn.Module], channels: int = 2, side: int = 4
) -> dict[str, Recipe]:
    """Of a name with ``{}`` for 1, 2 and 3 dimensions."""
    found: dict[str, Recipe] = {}
    for count in (1, 2, 3):
        found |= each(name.format(count), make, floats(2, channels, *[side] * count))
    return found


def unpooled(dims: int) -> Inputs:
    """Values and indices, as a pooling returns them."""

    def inputs() -> tuple[Tensor, ...]:
        pool = getattr(nn, f"MaxPool{dims}d")(2, return_indices=True)
        return pool(torch.randn(2, 1, *[4] * dims))

    return inputs


ACTIVATIONS = each(
    "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish "
    "PReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink",
    lambda kind: kind(),
    floats(3, 4),
)
ACTIVATIONS |= each("RReLU", lambda kind: kind(0.2, 0.2), floats(3, 4))  # not drawn
ACTIVATIONS |= each("GLU Softmax Softmin LogSoftmax", lambda kind: kind(dim=-1), floats(3, 4))
ACTIVATIONS |= each("Threshold", lambda kind: kind(0.1, 0.0), floats(3, 4))
ACTIVATIONS |= each("Softmax2d", lambda kind: kind(), floats(2, 3, 2, 2))

DROPOUTS = each("Dropout AlphaDropout FeatureAlphaDropout", lambda k: k(0.0), floats(3, 4))
DROPOUTS |= in_dimensions("Dropout{}d", lambda kind: kind(0.0))

POOLINGS = in_dimensions("MaxPool{}d", lambda kind: kind(2))
POOLINGS |= in_dimensions("AvgPool{}d", lambda kind: kind(2))
POOLINGS |= in_dimensions("LPPool{}d", lambda kind: kind(2, 2))
POOLINGS |= in_dimensions("AdaptiveMaxPool{}d", lambda kind: kind(2))
POOLINGS |= in_dimensions("AdaptiveAvgPool{}d", lambda kind: kind(2))
for dims in (1, 2, 3):
    POOLINGS |= each(f"MaxUnpool{dims}d", lambda kind: kind(2), unpooled(dims))
for dims in (2, 3):
    POOLINGS |= each(
        f"FractionalMaxPool{dims}d",
        lambda kind, dims=dims: kind(
            2, output_size=2, _random_samples=torch.full((2, 2, dims), 0.5)
        ),
        floats(2, 2, *[4] * dims),
    )

PADDINGS: dict[str, Recipe] = {}
for kind in ("Circular", "Reflection", "Replication", "Zero"):
    PADDINGS |= in_dimensions(kind + "Pad{}d", lambda kind: kind(1))
PADDINGS |= in_dimensions("ConstantPad{}d", lambda kind: kind(1, 0.5))

SHAPES = {
    **each("ChannelShuffle", lambda kind: kind(2), floats(2, 4, 3, 3)),
    **each("Flatten", lambda kind: kind(), floats(2, 3, 2)),
    **each("Unflatten", lambda kind: kind(1, (2, 2)), floats(3, 4)),
    **each("Fold", lambda kind: kind((4, 4), 2), floats(2, 8, 9)),
    **each("Unfold", lambda kind: kind(2), floats(2, 2, 4, 4)),
    **each("PixelShuffle", lambda kind: kind(2), floats(2, 4, 3, 3)),
    **each("PixelUnshuffle", lambda kind: kind(2), floats(2, 1, 4, 4)),
    **each("Upsample", lambda kind: kind(scale_factor=2), floats(2, 2, 3, 3)),
    **each(
        "UpsamplingNearest2d UpsamplingBilinear2d", lambda k: k(scale_factor=2), floats(2, 2, 3, 3)
    ),
}

NORMS = in_dimensions("BatchNorm{}d", lambda kind: kind(2))
NORMS |= in_dimensions("InstanceNorm{}d", lambda kind: kind(2, affine=True))
NORMS |= each("SyncBatchNorm", lambda kind: kind(2), floats(3, 2, 4, 4))
NORMS |= each("GroupNorm", lambda kind: kind(2, 4), floats(3, 4, 3, 3))
NORMS |= each("LayerNorm RMSNorm", lambda kind: kind(4), floats(3, 4))
NORMS |= each("LocalResponseNorm CrossMapLRN2d", lambda kind: kind(2), floats(2, 4, 3, 3))

WEIGHTS = in_dimensions("Conv{}d", lambda kind: kind(2, 3, 2))
WEIGHTS |= in_dimensions("ConvTranspose{}d", lambda kind: kind(2, 3, 2))
WEIGHTS |= each("Linear", lambda kind: kind(4, 3), floats(3, 4))
WEIGHTS |= each("Bilinear", lambda k: k(3, 4, 2), lambda: (torch.randn(3, 3), torch.randn(3, 4)))
WEIGHTS |= each("Embedding", lambda k: k(6, 3, padding_idx=0), lambda: (indices(6, 2, 4),))
WEIGHTS |= each("EmbeddingBag", lambda k: k(6, 3, padding_idx=0), lambda: (indices(6, 2, 4),))

LAZY = in_dimensions("LazyConv{}d", lambda kind: kind(3, 2))
LAZY |= in_dimensions("LazyConvTranspose{}d", lambda kind: kind(3, 2))
LAZY |= in_dimensions("LazyBatchNorm{}d", lambda kind: kind())
LAZY |= in_dimensions("LazyInstanceNorm{}d", lambda kind: kind(affine=True))
LAZY |= each("LazyLinear", lambda kind: kind(3), floats(3, 4))

SEQUENCES = {
    **each("RNN GRU LSTM", lambda kind: kind(3, 4, 2, batch_first=True), floats(2, 5, 3)),
    **each("RNNCell GRUCell LSTMCell", lambda kind: kind(3, 4), floats(2, 3)),
    **each(
        "MultiheadAttention",
        lambda kind: kind(4, 2, batch_first=True),
        lambda: tuple(torch.randn(2, 3, 4) for _ in range(3)),
    ),
    **each(
        "TransformerEncoderLayer",
        lambda kind: kind(4, 2, 8, 0.0, batch_first=True),
        floats(2, 3, 4),
    ),
    **each(
        "TransformerDecoderLayer",
        lambda kind: kind(4, 2, 8, 0.0, batch_first=True),
        lambda: (torch.randn(2, 3, 4), torch.randn(2, 5, 4)),
    ),
    **each(
        "TransformerEncoder",
        lambda kind: kind(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 2),
        floats(2, 3, 4),
    ),
    **each(
        "TransformerDecoder",
        lambda kind: kind(nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True), 2),
        lambda: (torch.randn(2, 3, 4), torch.randn(2, 5, 4)),
    ),
    **each(
        "Transformer",
        lambda kind: kind(4, 2, 1, 1, 8, 0.0, batch_first=True),
        lambda: (torch.randn(2, 3, 4), torch.randn(2, 5, 4)),
    ),
}


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape), torch.randn(*shape)


LOSSES = {
    **each("MSELoss L1Loss SmoothL1Loss HuberLoss", lambda k: k(), lambda: pair(3, 4)),
    **each(
        "CrossEntropyLoss NLLLoss",
        lambda k: k(torch.rand(4)),
        lambda: (torch.randn(3, 4), indices(4, 3)),
    ),
    **each("NLLLoss2d", lambda k: k(), lambda: (torch.randn(2, 3, 2, 2), indices(3, 2, 2, 2))),
    **each("BCELoss", lambda k: k(), lambda: (positive(3, 4) * 0.8, positive(3, 4))),
    **each(
        "BCEWithLogitsLoss",
        lambda k: k(pos_weight=torch.rand(4)),
        lambda: (torch.randn(3, 4), positive(3, 4)),
    ),
    **each(
        "KLDivLoss", lambda k: k(reduction="batchmean"), lambda: (torch.randn(3, 4), positive(3, 4))
    ),
    **each("PoissonNLLLoss", lambda k: k(), lambda: (torch.randn(3, 4), positive(3, 4))),
    **each("GaussianNLLLoss", lambda k: k(), lambda: (*pair(3, 4), positive(3, 4))),
    **each("SoftMarginLoss", lambda k: k(), lambda: (torch.randn(3, 4), signs(3, 4))),
    **each("HingeEmbeddingLoss", lambda k: k(), lambda: (torch.randn(3, 4), signs(3, 4))),
    **each("MarginRankingLoss", lambda k: k(), lambda: (*pair(3, 4), signs(3, 4))),
    **each("CosineEmbeddingLoss", lambda k: k(), lambda: (*pair(3, 4), signs(3))),
    **each("MultiMarginLoss", lambda k: k(), lambda: (torch.randn(3, 4), indices(4, 3))),
    **each(
        "MultiLabelMarginLoss",
        lambda k: k(),
        lambda: (torch.randn(3, 4), torch.tensor([[0, 2, -1, 1]] * 3)),
    ),
    **each(
        "MultiLabelSoftMarginLoss",
        lambda k: k(),
        lambda: (torch.randn(3, 4), indices(2, 3, 4).double()),
    ),
    **each(
        "TripletMarginLoss TripletMarginWithDistanceLoss",
        lambda k: k(),
        lambda: (*pair(3, 4), torch.randn(3, 4)),
    ),
    **each("CosineSimilarity PairwiseDistance", lambda k: k(), lambda: pair(3, 4)),
    **each(
        "CTCLoss",
        lambda k: k(),
        lambda: (
            torch.randn(5, 2, 4).log_softmax(-1),
            indices(3, 2, 2) + 1,
            torch.tensor([5, 5]),
            torch.tensor([2, 2]),
        ),
    ),
    **each(
        "AdaptiveLogSoftmaxWithLoss",
        lambda k: k(4, 6, [2, 4]),
        lambda: (torch.randn(3, 4), indices(6, 3)),
    ),
    **each("LinearCrossEntropyLoss", lambda k: k(4, 6), lambda: (torch.randn(3, 4), indices(6, 3))),
}

KINDS = {
    "Layers with weights": WEIGHTS,
    "Norms": NORMS,
    "Sequences": SEQUENCES,
    "Activations": ACTIVATIONS,
    "Poolings": POOLINGS,
    "Shapes": SHAPES,
    "Padding": PADDINGS,
    "Dropout": DROPOUTS,
    "Losses and distances": LOSSES,
    "Lazy": LAZY,
}
RECIPES = {name: recipe for recipes in KINDS.values() for name, recipe in recipes.items()}


def problem(name: str) -> tuple[nn.Module, Batch]:
    """Returns a model around a layer, and tasks."""
    torch.manual_seed(0)
    recipe = RECIPES[name]
    net = Around(recipe.make(), recipe.inputs())
    parts = []
    for _ in range(2):
        inputs = zip(*(recipe.inputs() for _ in range(TASKS)), strict=True)
        parts += [tuple(torch.stack(of_tasks) for of_tasks in inputs), torch.randn(TASKS, 3)]
    return net, tuple(parts)
