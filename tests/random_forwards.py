"""Random forwards as strangers write them, and torch's own layers to hold them against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import mamlpp_ext as mpp

CHANNELS, SIDE, WAYS, STEPS, TASKS = 4, 8, 3, 2, 2


class Log:
    """The layout and aliasing of whatever a forward looks at.

    Not a list, which would be something that the forward leaves behind for the next.
    """

    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries: list[Any] = []


class TorchNorm(nn.Module):
    """What a PerStepBatchNorm2d is by definition: ``F.batch_norm`` with a row of everything."""

    def __init__(self, layer: mpp.PerStepBatchNorm2d) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in vars(layer).items() if k not in ("forward",)})

    def forward(self, x: Tensor) -> Tensor:
        step = self.inner_step
        weight, bias = self.weight[step.index], self.bias[step.index]
        if step.frozen:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        mean, var = self.running_mean[step.index], self.running_var[step.index]
        if self.training:
            self.num_batches_tracked[step.index] += 1
        seen = self.num_batches_tracked[step.index].item()
        mean, var = mean.detach(), var.detach()
        momentum = 1 / max(seen, 1) if self.momentum is None else self.momentum
        return F.batch_norm(x, mean, var, weight, bias, self.training, momentum, self.eps)


def torchs(net: nn.Module) -> nn.Module:
    """Puts torch's own layers in place of this package's, the parameters as they are."""
    for layer in list(net.modules()):
        if isinstance(layer, mpp.FusedSequential):
            layer.__class__ = nn.Sequential
        for name, child in layer._modules.items():
            if isinstance(child, mpp.PerStepBatchNorm2d):
                layer._modules[name] = TorchNorm(child)
    return net


class Scaling(TorchFunctionMode):
    """Somebody's own mode: scales what ReLUs and poolings return."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return y * 1.5 if func in (F.relu, F.max_pool2d, torch.max_pool2d) else y


class Flat(torch.autograd.Function):
    """Somebody's own function, whose backward has every reason to expect contiguous gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (g.view(-1) * 0.9).view(g.shape)


def seen(log: Log, name: str, x: Tensor) -> None:
    offset = x.storage_offset() if x._base is not None else 0
    entry = (name, tuple(x.shape), x.stride(), x.is_contiguous(), x._base is not None, offset)
    log.entries.append(entry)


# ---------------------------------------------------------------------------------------------
# What is done to a feature map [N, CHANNELS, H, W], which stays one.

Op = Callable[["Stranger", Tensor], Tensor]


def views(net: Stranger, h: Tensor) -> Tensor:
    n, c, height, width = h.shape
    h = h.view(n, c, -1).view(n, -1).view(1, n, c, height, width)[0]
    return h.unsqueeze(1).view(n, c, height, width)


def writes_through_a_view(net: Stranger, h: Tensor) -> Tensor:
    h.flatten(1)[:, ::2] *= 0.5
    return h


def writes_through_contiguous(net: Stranger, h: Tensor) -> Tensor:
    h.contiguous().clamp_(min=-0.3)
    return h


def keeps_a_view_and_writes(net: Stranger, h: Tensor) -> Tensor:
    flat = h.view(len(h), -1)
    F.leaky_relu(h, 0.3, inplace=True)
    return h + 0.1 * flat.sum(1).view(-1, 1, 1, 1)


def reads_strides(net: Stranger, h: Tensor) -> Tensor:
    return h * (1 + 0.01 * (h.stride(1) % 7) + 0.1 * h.is_contiguous())


def takes_by_stride(net: Stranger, h: Tensor) -> Tensor:
    n, c, height, width = h.shape
    return h + 0.1 * h.as_strided((n, c, height, width), h.stride(), h.storage_offset()).tanh()


def permutes(net: Stranger, h: Tensor) -> Tensor:
    swapped = h.permute(0, 2, 3, 1)
    seen(net.log, "permuted", swapped)
    return swapped.contiguous().permute(0, 3, 1, 2)


def slices(net: Stranger, h: Tensor) -> Tensor:
    return torch.cat([h[:, 1:], h[:, :1]], 1) + h.transpose(2, 3)


def own_function(net: Stranger, h: Tensor) -> Tensor:
    return Flat.apply(h)


def without_gradient(net: Stranger, h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.abs().mean()
    return h / (0.5 + scale)


def complex_views(net: Stranger, h: Tensor) -> Tensor:
    n, c, height, width = h.shape
    turned = torch.view_as_complex(h.view(n, c, height, width // 2, 2)) * (0.8 + 0.2j)
    return torch.view_as_real(turned).view(n, c, height, width)


def standardised(net: Stranger, h: Tensor) -> Tensor:
    weight = net.extra.weight
    flat = weight.view(len(weight), -1)
    flat = flat - flat.mean(1, keepdim=True)
    return F.conv2d(h, flat.view_as(weight), net.extra.bias, padding=1)


def spatial_transformer(net: Stranger, h: Tensor) -> Tensor:
    theta = net.theta.expand(len(h), 2, 3)
    grid = F.affine_grid(theta, list(h.shape), align_corners=False)
    return F.grid_sample(h, grid, align_corners=False)


def gradient_seen(net: Stranger, h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda g: (g.view(-1) * 0.7).view(g.shape))
    return h


def within_a_mode(net: Stranger, h: Tensor) -> Tensor:
    with Scaling():
        return net.shared(h)


def called_again(net: Stranger, h: Tensor) -> Tensor:
    return net.shared(net.shared(h))


OPS: dict[str, Op] = {
    op.__name__: op
    for op in (
        views,
        writes_through_a_view,
        writes_through_contiguous,
        keeps_a_view_and_writes,
        reads_strides,
        takes_by_stride,
        permutes,
        slices,
        own_function,
        without_gradient,
        complex_views,
        standardised,
        spatial_transformer,
        gradient_seen,
        within_a_mode,
        called_again,
    )
}
FIRST_ORDER_ALONE = {"spatial_transformer"}  # torch has no second derivative of it
HOOKS = ("keeps", "changes", "keeps gradients")


@dataclasses.dataclass(frozen=True)
class Forward:
    """A random forward; printed when a property fails.

    Attributes:
        blocks: of each run: the activation, the pooling, and whether it is in a nested Sequential.
        ops: between the runs, a list behind each.
        hook: on a layer inside of a run, or None.
        frozen: whether a convolution is frozen in the second iteration, and thawed in the third.
        least: the thresholds of a run in size: in first and second order, and as one function.
        seed: of the numbers.
    """

    blocks: tuple[tuple[str, str, bool], ...]
    ops: tuple[tuple[str, ...], ...]
    hook: str | None
    frozen: bool
    least: tuple[int, int, int]
    seed: int


def forwards(names: list[str]) -> st.SearchStrategy[Forward]:
    """Draws forwards of these operations.

    Who moves a feature map to channels_last takes no view of a gradient behind it: in what layout a
    second derivative arrives there depends on which zeros torch happens to add to it.
    """
    block = st.tuples(
        st.sampled_from(["relu", "leaky", "inplace", "none"]),
        st.sampled_from(["pool", "overlapping", "none"]),
        st.booleans(),
    )
    return st.integers(1, 2).flatmap(
        lambda count: st.builds(
            Forward,
            blocks=st.tuples(*[block] * count),
            ops=st.tuples(*[st.lists(st.sampled_from(names), max_size=2).map(tuple)] * count),
            hook=st.sampled_from([None, None, *HOOKS]),
            frozen=st.booleans(),
            least=st.tuples(*[st.sampled_from([0, 500, 10**9])] * 3),
            seed=st.integers(0, 999),
        ).filter(lambda plan: not _views_gradients_behind_a_permutation(plan))
    )


def _views_gradients_behind_a_permutation(plan: Forward) -> bool:
    names = {name for names in plan.ops for name in names}
    views = bool(names & {"gradient_seen", "own_function"}) or plan.hook == "keeps gradients"
    return "permutes" in names and views


class Stranger(nn.Module):
    """A model with such a forward."""

    def __init__(self, plan: Forward) -> None:
        super().__init__()
        self.plan = plan
        self.log = Log()
        source, stages = 2, []
        for activation, pooling, nested in plan.blocks:
            layers = [nn.Conv2d(source, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)]
            layers += [_ACTIVATIONS[activation]()] if activation != "none" else []
            layers += [_POOLINGS[pooling]()] if pooling != "none" else []
            stage = nn.Sequential(*layers)
            stages.append(nn.Sequential(stage, nn.Identity()) if nested else stage)
            source = CHANNELS
        self.stages = nn.ModuleList(stages)
        self.shared = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()
        )
        self.extra = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.theta = nn.Parameter(torch.tensor([[0.9, 0.1, 0.0], [-0.1, 0.9, 0.05]]))
        self.head = nn.Linear(CHANNELS, WAYS)

    def forward(self, h: Tensor) -> Tensor:
        for stage, ops in zip(self.stages, self.plan.ops, strict=True):
            h = stage(h)
            seen(self.log, "stage", h)
            for name in ops:
                h = OPS[name](self, h)
                seen(self.log, name, h)
        return self.head(h.mean((2, 3)))


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "inplace": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.2),
}
_POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "pool": lambda: nn.MaxPool2d(2),
    "overlapping": lambda: nn.MaxPool2d(3, 1, 1),
}


def make(plan: Forward) -> tuple[Stranger, mpp.LSLR]:
    """The converted model, no two numbers alike, and its rates."""
    torch.manual_seed(plan.seed)
    net: Any = mpp.convert_batchnorm(Stranger(plan), STEPS)
    for layer in net.modules():
        if isinstance(layer, mpp.PerStepBatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.weight.data[:, plan.seed % CHANNELS] *= -1  # one falls with its input
            layer.bias.data.normal_()
            layer.momentum = None if plan.seed % 3 == 0 else 0.1
    lslr = mpp.LSLR(net, STEPS)
    lslr.rates.data.uniform_(-0.1, 0.3)
    return net, lslr


def hooked(net: Stranger) -> list[Any]:
    """Registers the plan's hook on a layer inside of a run; returns what removes it."""
    layer = next(layer for layer in net.stages[0].modules() if isinstance(layer, nn.Conv2d))
    if net.plan.hook == "keeps":
        return [layer.register_forward_hook(lambda m, args, y: seen(net.log, "hook", y))]
    if net.plan.hook == "changes":
        return [layer.register_forward_hook(lambda m, args, y: 2 * y + 0.1)]
    if net.plan.hook == "keeps gradients":
        return [layer.register_forward_hook(_watch_gradient)]
    return []


def _watch_gradient(layer: nn.Module, args: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda g: g.view(-1).view(g.shape))


def tasks(plan: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(plan.seed + 1)
    images = torch.randn(2, TASKS, 3, 2, SIDE, SIDE, generator=generator)
    labels = torch.randint(WAYS, (2, TASKS, 3), generator=generator)
    return images[0], labels[0], images[1], labels[1]
