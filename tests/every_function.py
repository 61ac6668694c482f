"""Every function of ``torch.nn.functional``, small, with its flags: what to call, and with what."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What is no function of tensors that a model would learn through, or draws without a flag.
NOT_RUN = {
    "assert_int_or_pair": "a helper",
    "boolean_dispatch": "a helper",
    "grouped_mm": "of bfloat16 alone",
    "gumbel_softmax": "draws",
    "native_channel_shuffle": "has no derivative",
    "scaled_addmm": "of 8-bit numbers alone",
    "scaled_addmm_": "of 8-bit numbers alone",
    "scaled_grouped_mm": "of 8-bit numbers alone",
    "scaled_mm": "of 8-bit numbers alone",
}

Draw = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A function of weights and inputs.

    Attributes:
        call: with the weights, then the inputs.
        weights: their shapes.
        inputs: how to draw each, for one task.
    """

    call: Callable[..., Any]
    weights: tuple[tuple[int, ...], ...]
    inputs: tuple[Draw, ...]


class Applied(nn.Module):
    """The function as a model."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.weights = nn.ParameterList(
            torch.linspace(0.6, 1.4, max(1, torch.Size(shape).numel())).reshape(shape)
            for shape in recipe.weights
        )

    def forward(self, *inputs: Tensor) -> Any:
        return self.recipe.call(*self.weights, *inputs)


def floats(*shape: int) -> Draw:
    return lambda: torch.randn(shape)


def positive(*shape: int) -> Draw:
    return lambda: torch.rand(shape) + 0.5


def below(limit: int, *shape: int) -> Draw:
    return lambda: torch.randint(limit, shape)


def signs(*shape: int) -> Draw:
    return lambda: torch.randint(2, shape) * 2.0 - 1


def scaled(function: Callable[..., Any], *shape: int, others: tuple[Draw, ...] = ()) -> Recipe:
    """A function of an input of this shape, which a weight scales first, and of others."""
    shape = shape or (3, 4)
    return Recipe(
        lambda weight, x, *more: function(x * weight, *more),
        (shape[-1:],),
        (floats(*shape), *others),
    )


def of_weights(
    function: Callable[..., Any], weights: tuple[tuple[int, ...], ...], *inputs: Draw
) -> Recipe:
    """A function of an input and weights of its own, in this order."""
    count = len(weights)
    return Recipe(lambda *all_: function(*all_[count:], *all_[:count]), weights, inputs)


def flags(function: Callable[..., Any], *shape: int, **choices: Any) -> dict[str, Recipe]:
    """A recipe for each value of the flags, one flag at a time."""
    found = {"": scaled(function, *shape)}
    for name, values in choices.items():
        for value in values:
            found[f"{name}={value}"] = scaled(_with(function, name, value), *shape)
    return found


def _with(function: Callable[..., Any], name: str, value: Any) -> Callable[..., Any]:
    return functools.partial(function, **{name: value})


def loss(
    function: Callable[..., Any], target: Draw, *shape: int, **choices: Any
) -> dict[str, Recipe]:
    """A recipe for each value of a loss's flags; the input is scaled by a weight."""
    choices = {"reduction": ("mean", "sum", "none"), **choices}
    return {
        f"{name}={value}": scaled(_with(function, name, value), *shape, others=(target,))
        for name, values in choices.items()
        for value in values
    }


def _attention(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    found, _ = F.multi_head_attention_forward(
        *(query, key, value, 4, 2),
        in_proj_weight=weight[:12],
        in_proj_bias=weight[:12].sum(1),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=weight[12:],
        out_proj_bias=None,
    )
    return found


INPLACE = {"inplace": (True,)}


def _pooled(function: Callable[..., Any], dim: int, **more: Any) -> dict[str, Recipe]:
    shape = (2, 3, *[6] * dim)
    found = {"": scaled(lambda x: function(x, 2), *shape)}
    for name, value in more.items():
        found[f"{name}={value}"] = scaled(
            lambda x, n=name, v=value: function(x, 2, **{n: v}), *shape
        )
    return found


def _unpooled(dim: int) -> dict[str, Recipe]:
    pool, unpool = (getattr(F, f"max_{kind}{dim}d") for kind in ("pool", "unpool"))
    both = lambda x: unpool(*pool(x, 2, return_indices=True), 2)  # noqa: E731
    return {"": scaled(both, 2, 3, *[4] * dim)}


def _fractional(dim: int, **more: Any) -> dict[str, Recipe]:
    function, samples = getattr(F, f"fractional_max_pool{dim}d"), torch.full((2, 3, dim), 0.4)
    return {
        "": scaled(
            lambda x: function(x, 2, output_size=3, _random_samples=samples.to(x), **more),
            *(2, 3, *[6] * dim),
        )
    }


def _convolution(name: str, dim: int) -> dict[str, Recipe]:
    function, weight = getattr(F, name), (2, 2, *[3] * dim)

    def by_groups(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return function(x, weight[:, :1], bias, groups=2)

    calls = {
        "": function,
        "stride=2": _with(function, "stride", 2),
        "padding=1": _with(function, "padding", 1),
        "groups=2": by_groups,
    }
    inputs = floats(2, 2, *[5] * dim)
    return {flag: of_weights(call, (weight, (2,)), inputs) for flag, call in calls.items()}


FUNCTIONS: dict[str, dict[str, Recipe]] = {
    **{
        name: flags(getattr(F, name), **INPLACE)
        for name in (
            *("relu", "hardtanh", "relu6", "elu", "selu", "celu", "leaky_relu", "rrelu"),
            *("hardsigmoid", "silu", "mish", "hardswish"),
        )
    },
    **{
        name: flags(getattr(F, name))
        for name in (
            *("relu_", "hardtanh_", "elu_", "selu_", "celu_", "leaky_relu_", "rrelu_"),
            *("logsigmoid", "hardshrink", "tanhshrink", "softsign", "softplus", "softshrink"),
            *("tanh", "sigmoid"),
        )
    },
    "threshold": flags(lambda x, **f: F.threshold(x, 0.1, 0.5, **f), **INPLACE),
    "threshold_": flags(lambda x: F.threshold_(x, 0.1, 0.5)),
    "gelu": flags(F.gelu, approximate=("none", "tanh")),
    "glu": {f"dim={dim}": scaled(_with(F.glu, "dim", dim), 4, 4) for dim in (0, 1)},
    "prelu": {"": of_weights(F.prelu, ((3,),), floats(2, 3, 4))},
    **{
        name: {f"dim={dim}": scaled(_with(getattr(F, name), "dim", dim)) for dim in (0, 1)}
        for name in ("softmin", "softmax", "log_softmax")
    },
    # Without a draw: nothing is dropped.
    **{
        name: flags(_with(getattr(F, name), "p", 0.0), *shape, training=(False,), inplace=(True,))
        for name, shape in {
            "dropout": (3, 4),
            "alpha_dropout": (3, 4),
            "dropout1d": (2, 3, 4),
            "dropout2d": (2, 3, 4, 4),
            "dropout3d": (2, 3, 2, 2, 2),
            "feature_alpha_dropout": (2, 3, 4),
        }.items()
    },
    **{
        f"conv{kind}{dim}d": _convolution(f"conv{kind}{dim}d", dim)
        for kind in ("", "_transpose")
        for dim in (1, 2, 3)
    },
    "conv_tbc": {"": of_weights(F.conv_tbc, ((3, 2, 2), (2,)), floats(5, 2, 2))},
    **{
        f"avg_pool{dim}d": _pooled(
            getattr(F, f"avg_pool{dim}d"), dim, padding=1, ceil_mode=True, count_include_pad=False
        )
        for dim in (1, 2, 3)
    },
    **{
        f"max_pool{dim}d": _pooled(
            getattr(F, f"max_pool{dim}d"), dim, padding=1, dilation=2, return_indices=True
        )
        for dim in (1, 2, 3)
    },
    **{
        f"max_pool{dim}d_with_indices": _pooled(getattr(F, f"max_pool{dim}d_with_indices"), dim)
        for dim in (1, 2, 3)
    },
    **{f"max_unpool{dim}d": _unpooled(dim) for dim in (1, 2, 3)},
    **{f"fractional_max_pool{dim}d": _fractional(dim) for dim in (2, 3)},
    **{
        f"fractional_max_pool{dim}d_with_indices": _fractional(dim, return_indices=True)
        for dim in (2, 3)
    },
    **{
        f"lp_pool{dim}d": {
            "": scaled(lambda x, f=f"lp_pool{dim}d": getattr(F, f)(x, 2.0, 2), *(2, 3, *[4] * dim))
        }
        for dim in (1, 2, 3)
    },
    **{
        f"adaptive_{kind}_pool{dim}d{end}": {
            "": scaled(
                lambda x, f=f"adaptive_{kind}_pool{dim}d{end}": getattr(F, f)(x, 2),
                *(2, 3, *[5] * dim),
            )
        }
        for kind, ends in (("avg", ("",)), ("max", ("", "_with_indices")))
        for end in ends
        for dim in (1, 2, 3)
    },
    "linear": {"": of_weights(F.linear, ((2, 4), (2,)), floats(3, 4))},
    "bilinear": {"": of_weights(F.bilinear, ((2, 4, 3), (2,)), floats(3, 4), floats(3, 3))},
    "embedding": {
        flag: Recipe(lambda w, ids, m=more: F.embedding(ids, w, **m), ((5, 3),), (below(5, 2, 4),))
        for flag, more in {
            "": {},
            "padding_idx=0": {"padding_idx": 0},
            "max_norm=1": {"max_norm": 1.0},
            "scale_grad_by_freq=True": {"scale_grad_by_freq": True},
            "sparse=True": {"sparse": True},
        }.items()
    },
    "embedding_bag": {
        flag: Recipe(
            lambda w, ids, m=more: F.embedding_bag(ids, w, **m), ((5, 3),), (below(5, 2, 4),)
        )
        for flag, more in {
            "mode=mean": {"mode": "mean"},
            "mode=sum": {"mode": "sum"},
            "mode=max": {"mode": "max"},
            "padding_idx=0": {"padding_idx": 0},
            "include_last_offset=False": {"include_last_offset": False},
        }.items()
    },
    "batch_norm": {
        "": Recipe(
            lambda w, b, x: F.batch_norm(x, None, None, training=True) * w + b,
            ((4,), (4,)),
            (floats(6, 4),),
        ),
        "weight": Recipe(
            lambda w, b, x: F.batch_norm(x, None, None, w, b, training=True),
            ((3,), (3,)),
            (floats(6, 3, 4),),
        ),
        "training=False": Recipe(
            lambda w, b, x: F.batch_norm(x, torch.zeros(3), torch.ones(3), w, b),
            ((3,), (3,)),
            (floats(6, 3, 4),),
        ),
    },
    "instance_norm": {
        "": scaled(F.instance_norm, 2, 3, 5),
        "weight": Recipe(
            lambda w, b, x: F.instance_norm(x, weight=w, bias=b), ((3,), (3,)), (floats(2, 3, 5),)
        ),
    },
    "layer_norm": {
        "": scaled(lambda x: F.layer_norm(x, (4,))),
        "weight": of_weights(
            lambda x, w, b: F.layer_norm(x, (4,), w, b), ((4,), (4,)), floats(3, 4)
        ),
    },
    "rms_norm": {
        "": scaled(lambda x: F.rms_norm(x, (4,))),
        "weight": of_weights(lambda x, w: F.rms_norm(x, (4,), w), ((4,),), floats(3, 4)),
    },
    "group_norm": {
        "": scaled(lambda x: F.group_norm(x, 2), 2, 4, 3),
        "weight": of_weights(
            lambda x, w, b: F.group_norm(x, 2, w, b), ((4,), (4,)), floats(2, 4, 3)
        ),
    },
    "local_response_norm": {"": scaled(lambda x: F.local_response_norm(x, 2), 2, 4, 3)},
    "normalize": flags(F.normalize, dim=(0,), p=(1.0,)),
    "ctc_loss": {
        f"zero_infinity={zero}": scaled(
            lambda x, y, z=zero: F.ctc_loss(
                x.log_softmax(-1), y, torch.full((2,), 6), torch.full((2,), 2), zero_infinity=z
            ),
            *(6, 2, 4),
            others=(lambda: torch.randint(1, 4, (2, 2)),),
        )
        for zero in (False, True)
    },
    "nll_loss": {
        **loss(
            lambda x, y, **f: F.nll_loss(x.log_softmax(1), y, **f), below(4, 3), ignore_index=(0,)
        ),
        "weight": scaled(
            lambda x, y: F.nll_loss(x.log_softmax(1), y, torch.tensor([1.0, 2, 3, 4])),
            others=(below(4, 3),),
        ),
        "of maps": scaled(
            lambda x, y: F.nll_loss(x.log_softmax(1), y, ignore_index=1),
            *(2, 3, 2, 2),
            others=(below(3, 2, 2, 2),),
        ),
    },
    "cross_entropy": {
        **loss(F.cross_entropy, below(4, 3), ignore_index=(0,), label_smoothing=(0.1,)),
        "weight": scaled(
            lambda x, y: F.cross_entropy(x, y, torch.tensor([1.0, 2, 3, 4])),
            others=(below(4, 3),),
        ),
        "of shares": scaled(lambda x, y: F.cross_entropy(x, y.softmax(1)), others=(floats(3, 4),)),
    },
    "linear_cross_entropy": {
        "": of_weights(
            lambda x, y, w: F.linear_cross_entropy(x, w, y), ((5, 4),), floats(3, 4), below(5, 3)
        ),
    },
    "poisson_nll_loss": loss(
        lambda x, y, **f: F.poisson_nll_loss(0.3 * x, y, **f),
        positive(3, 4),
        log_input=(True,),
        full=(True,),
    ),
    "gaussian_nll_loss": loss(
        lambda x, y, **f: F.gaussian_nll_loss(x, y, torch.full_like(x, 0.7), **f),
        floats(3, 4),
        full=(True,),
    ),
    "kl_div": loss(
        lambda x, y, **f: F.kl_div(x.log_softmax(1), y.log_softmax(1), log_target=True, **f),
        floats(3, 4),
        reduction=("batchmean", "sum", "none"),
    ),
    "binary_cross_entropy": loss(
        lambda x, y, **f: F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), **f), floats(3, 4)
    ),
    "binary_cross_entropy_with_logits": {
        **loss(
            lambda x, y, **f: F.binary_cross_entropy_with_logits(x, y.sigmoid(), **f), floats(3, 4)
        ),
        "pos_weight": scaled(
            lambda x, y: F.binary_cross_entropy_with_logits(
                x, y.sigmoid(), pos_weight=torch.tensor([1.0, 2, 3, 4])
            ),
            others=(floats(3, 4),),
        ),
    },
    "smooth_l1_loss": loss(F.smooth_l1_loss, floats(3, 4), beta=(0.5,)),
    "huber_loss": loss(F.huber_loss, floats(3, 4), delta=(0.5,)),
    "l1_loss": loss(F.l1_loss, floats(3, 4)),
    "mse_loss": {
        **loss(F.mse_loss, floats(3, 4)),
        "weight": scaled(
            lambda x, y: F.mse_loss(x, y, weight=torch.full_like(y, 0.5)), others=(floats(3, 4),)
        ),
    },
    "margin_ranking_loss": loss(
        lambda x, y, **f: F.margin_ranking_loss(x, x.flip(1), y, margin=0.3, **f), signs(3, 4)
    ),
    "hinge_embedding_loss": loss(F.hinge_embedding_loss, signs(3, 4), margin=(0.5,)),
    "multilabel_margin_loss": loss(
        F.multilabel_margin_loss, lambda: torch.tensor([[0, 2, -1, 1]] * 3)
    ),
    "soft_margin_loss": loss(F.soft_margin_loss, signs(3, 4)),
    "multilabel_soft_margin_loss": loss(F.multilabel_soft_margin_loss, below(2, 3, 4)),
    "cosine_embedding_loss": loss(
        lambda x, y, **f: F.cosine_embedding_loss(x, x.flip(1), y, margin=0.1, **f), signs(3)
    ),
    "multi_margin_loss": loss(F.multi_margin_loss, below(4, 3), p=(2,), margin=(0.5,)),
    "triplet_margin_loss": loss(
        lambda x, y, **f: F.triplet_margin_loss(x, y, x.flip(1), **f), floats(3, 4), swap=(True,)
    ),
    "triplet_margin_with_distance_loss": loss(
        lambda x, y, **f: F.triplet_margin_with_distance_loss(x, y, x.flip(1), **f),
        floats(3, 4),
        swap=(True,),
    ),
    "pixel_shuffle": {"": scaled(lambda x: F.pixel_shuffle(x, 2), 2, 4, 3, 3)},
    "pixel_unshuffle": {"": scaled(lambda x: F.pixel_unshuffle(x, 2), 2, 2, 4, 4)},
    "channel_shuffle": {"": scaled(lambda x: F.channel_shuffle(x, 2), 2, 4, 3, 3)},
    **{
        name: {
            f"{mode}, {size}": scaled(
                lambda x, f=name, m=mode, s=size: getattr(F, f)(x, scale_factor=s, mode=m),
                *(2, 3, *[4] * dim),
            )
            for mode, dim in modes
            for size in (2, 0.5)
        }
        for name, modes in {
            "upsample": (("nearest", 2), ("bilinear", 2)),
            "interpolate": (
                *(("nearest", 1), ("nearest", 2), ("nearest", 3), ("nearest-exact", 2)),
                *(("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3), ("area", 2)),
            ),
        }.items()
    },
    **{
        name: {"": scaled(lambda x, f=name: getattr(F, f)(x, scale_factor=2), 2, 3, 4, 4)}
        for name in ("upsample_nearest", "upsample_bilinear")
    },
    "grid_sample": {
        f"{mode}, {padding}": scaled(
            lambda x, g, m=mode, p=padding: F.grid_sample(
                x, g.tanh(), mode=m, padding_mode=p, align_corners=False
            ),
            *(2, 3, 4, 4),
            others=(floats(2, 5, 5, 2),),
        )
        for mode in ("bilinear", "nearest", "bicubic")
        for padding in ("zeros", "border", "reflection")
    },
    "affine_grid": {
        "": scaled(lambda x: F.affine_grid(x, [2, 3, 4, 4], align_corners=False), 2, 2, 3)
    },
    "pad": {
        mode: scaled(lambda x, m=mode: F.pad(x, (1, 2, 1, 0), mode=m), 2, 3, 4, 4)
        for mode in ("constant", "reflect", "replicate", "circular")
    },
    "pairwise_distance": {
        f"p={p}": scaled(lambda x, y, p=p: F.pairwise_distance(x, y, p), others=(floats(3, 4),))
        for p in (1.0, 2.0, 3.0)
    },
    "pdist": {f"p={p}": scaled(lambda x, p=p: F.pdist(x, p)) for p in (1.0, 2.0, 3.0)},
    "cosine_similarity": {"": scaled(F.cosine_similarity, others=(floats(3, 4),))},
    "one_hot": {
        "": Recipe(lambda w, y: F.one_hot(y, 4) * w, ((4,),), (below(4, 3),)),
    },
    "unfold": {"": scaled(lambda x: F.unfold(x, 2), 2, 3, 4, 4)},
    "fold": {"": scaled(lambda x: F.fold(x, (4, 4), 2), 2, 12, 9)},
    "scaled_dot_product_attention": {
        "": scaled(
            lambda x, y: F.scaled_dot_product_attention(x, y, y),
            2,
            2,
            3,
            4,
            others=(floats(2, 2, 3, 4),),
        ),
        "is_causal=True": scaled(
            lambda x, y: F.scaled_dot_product_attention(x, y, y, is_causal=True),
            *(2, 2, 3, 4),
            others=(floats(2, 2, 3, 4),),
        ),
        "attn_mask": scaled(
            lambda x, y, m: F.scaled_dot_product_attention(x, y, y, m.bool()),
            *(2, 2, 3, 4),
            others=(floats(2, 2, 3, 4), lambda: torch.randint(2, (3, 3)) + torch.eye(3).long()),
        ),
    },
    "multi_head_attention_forward": {
        "": of_weights(_attention, ((16, 4),), *[floats(3, 2, 4)] * 3),
    },
}
