"""Random models and tasks for the property tests, as hypothesis strategies."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import mamlpp_ext as mpp
from any_model import Batch
from mamlpp_ext.steps import per_step_tables

CONVOLUTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
ADAPT: dict[str, object] = {
    "default": None,
    "everything": "*",
    "head": ["head.*"],
    "weights": ["*.weight"],
    "every other": lambda name: sum(map(ord, name)) % 2 == 0 or name == "head.weight",
}
sharings = st.sampled_from(["nothing", "norm", "block", "two names", "weights"])
# Which parameters have rows beside those of norms.
ROWS: dict[str, object] = {
    "norms": None,
    "every other": lambda name: sum(map(ord, name)) % 2 == 1 and name != "head.weight",
    "biases": lambda name: name.endswith("bias"),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A layer and what follows it, once or, with something shared, several times."""

    channels: int
    kernel: int
    bias: bool
    depth: int  # of the nesting
    shared: str
    smooth: bool  # tanh, not relu
    attention: bool  # in front
    kind: str  # of the norm: batch, group or layer
    norm: dict[str, object] | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a model and its tasks are made from; printed when a property fails."""

    blocks: tuple[Block, ...]
    in_channels: int
    sizes: tuple[int, ...]  # spatial
    support: int
    target: int
    tasks: int
    steps: int
    adapt: str
    frozen: int  # every how-manieth parameter, 0 for none
    rows: str
    inputs: str  # what the model takes: a tensor, a tuple of two or a dict
    channels_last: bool
    seed: int


_TAKES_BIAS = "bias" in inspect.signature(nn.BatchNorm1d).parameters  # from some torch on


def norms() -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries(
        {
            "eps": st.sampled_from([1e-2, 1e-1]),
            "momentum": st.sampled_from([0.1, None, 0.0, 1.0]),
            "affine": st.booleans(),
            **({"bias": st.booleans()} if _TAKES_BIAS else {}),
            "track_running_stats": st.booleans(),
        }
    )


def blocks(normed: bool, mixed: bool) -> st.SearchStrategy[Block]:
    kind = st.just("batch") if normed or not mixed else st.sampled_from(["batch", "group", "layer"])
    return st.builds(
        Block,
        channels=st.integers(1, 3),
        kernel=st.sampled_from([1, 3]),
        bias=st.booleans(),
        depth=st.integers(0, 2),
        shared=sharings,
        smooth=st.booleans(),
        attention=st.sampled_from([False, False, True]) if mixed else st.just(False),
        kind=kind,
        norm=norms() if normed else st.none() | norms(),
    )


@st.composite
def plans(draw: Callable[..., object], most_steps: int = 8, mixed: bool = True) -> Plan:
    """Models of one to three blocks with a batch norm at least, in 0 to 3 spatial dimensions.

    Mixed ones have attention and other norms as well.
    """
    sizes = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    least = 2 if all(size == 1 for size in sizes) else 1  # two values for each channel
    return Plan(
        blocks=(draw(blocks(True, mixed)), *draw(st.lists(blocks(False, mixed), max_size=2))),
        in_channels=draw(st.integers(1, 2)),
        sizes=sizes,
        support=draw(st.integers(least, 5)),
        target=draw(st.integers(least, 5)),
        tasks=draw(st.integers(1, 3)),
        steps=draw(st.integers(1, most_steps)),
        adapt=draw(st.sampled_from(sorted(ADAPT))),
        frozen=draw(st.sampled_from([0, 0, 2, 3])),
        rows=draw(st.sampled_from(sorted(ROWS))),
        inputs=draw(st.sampled_from(["tensor", "tensor", "tuple", "dict"])),
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


class TwoInputs(nn.Sequential):
    """A model of two inputs."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x * scale)


class Attention(nn.Module):
    """Attention of the places in an image, or of one place to itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2).transpose(1, 2) if x.dim() > 2 else x.unsqueeze(1)
        found = self.attention(places, places, places, need_weights=False)[0]
        return x + found.transpose(1, 2).reshape(x.shape)


class TwoNames(nn.Module):
    """A module that is registered, and used, under two names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.second = inner, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def build(plan: Plan, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with plain norms; no two numbers in it are alike."""
    torch.manual_seed(plan.seed)
    channels, body = plan.in_channels, []
    for block in plan.blocks:
        if block.attention:
            body.append(Attention(channels))
        body.append(_built(block, channels, plan.sizes))
        channels = block.channels
    features = channels * int(torch.tensor(plan.sizes).prod()) if plan.sizes else channels
    net = nn.Sequential() if plan.inputs == "tensor" else TwoInputs()
    net.add_module("body", nn.Sequential(*body))
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(features, 2))
    net.to(dtype)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) / 4)
    for place, (name, p) in enumerate(net.named_parameters()):
        p.requires_grad_(plan.frozen == 0 or place % plan.frozen > 0 or name == "head.weight")
    return net


def with_rows(plan: Plan, net: nn.Module) -> nn.Module:
    """The model with rows in its norms and elsewhere."""
    net = mpp.convert_norm(net, plan.steps)
    choose = ROWS[plan.rows]
    tables = {id(table) for table in per_step_tables(net).values()}
    rest = [n for n, p in net.named_parameters() if p.requires_grad and id(p) not in tables]
    chosen = [] if choose is None else [name for name in rest if choose(name)]
    return mpp.per_step_parameters(net, plan.steps, chosen) if chosen else net


def _built(block: Block, channels: int, sizes: tuple[int, ...]) -> nn.Module:
    dims = len(sizes)

    def layer(channels: int) -> nn.Module:
        if dims == 0:
            return nn.Linear(channels, block.channels, bias=block.bias)
        settings = {"padding": block.kernel // 2, "bias": block.bias}
        return CONVOLUTIONS[dims](channels, block.channels, block.kernel, **settings)

    def norm() -> nn.Module:
        if block.norm is None:
            return nn.Identity()
        eps, affine = block.norm["eps"], block.norm["affine"]
        if block.kind == "group":
            return nn.GroupNorm(1, block.channels, eps, affine)
        if block.kind == "layer":
            return nn.LayerNorm((block.channels, *sizes), eps, affine)
        return NORMS[dims](block.channels, **block.norm)

    def several() -> list[nn.Module]:
        act = nn.Tanh() if block.smooth else nn.ReLU()
        first, again = [layer(channels), norm(), act], layer(block.channels)
        if block.shared == "nothing":
            return first
        if block.shared == "norm":
            return [*first, again, first[1], act]
        if block.shared == "weights":
            twin = layer(block.channels)
            twin.weight = again.weight
            return [*first, again, act, twin, norm(), act]
        inner = nn.Sequential(again, norm(), act)
        shared = [inner, inner] if block.shared == "block" else [TwoNames(inner)]
        return [layer(channels), act, *shared]

    built = nn.Sequential(*several())
    for _ in range(block.depth):
        built = nn.Sequential(built)
    return built


def tasks(plan: Plan, dtype: torch.dtype = torch.float64) -> Batch:
    """Stacked tasks; with ``channels_last`` each task's inputs are in that format."""
    generator = torch.Generator().manual_seed(plan.seed + 1)
    made: list[Any] = []
    for examples in (plan.support, plan.target):
        shape = (plan.tasks, examples, plan.in_channels, *plan.sizes)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if plan.channels_last and len(plan.sizes) in CHANNELS_LAST:
            x = x.movedim(2, -1).contiguous().movedim(-1, 2)
        scale = 1 + torch.rand(shape[:2], generator=generator, dtype=torch.float64).to(dtype)
        scale = scale.view(*shape[:2], *[1] * (len(shape) - 2))
        inputs = {"tensor": x, "tuple": (x, scale), "dict": {"scale": scale, "x": x}}[plan.inputs]
        made += [inputs, torch.randint(2, shape[:2], generator=generator)]
    return tuple(made)
