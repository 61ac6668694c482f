"""In every path each step reads its row, of whatever has rows, as a loop written out does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.stateless import _reparametrize_module

import mamlpp_ext as mpp
from any_model import PATHS, STEPS, TASKS, Batch, Found, assert_same, outcome, size_of_outputs

pytestmark = pytest.mark.usefixtures("float64")


class OwnNorm(nn.Module):
    """As the norms of Llama and its like, which are none of torch's."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-2).rsqrt()


class Vision(nn.Module):
    """Parameters of its own, in a list and in a dict, and a block that reads its layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(3, 4))
        self.scales = nn.ParameterList([torch.ones(4), torch.ones(4)])
        self.shifts = nn.ParameterDict({"first": torch.zeros(4)})
        self.inside = nn.ModuleDict({"norm": nn.LayerNorm(4)})
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.place) * self.scales[0] + self.shifts["first"]
        norm = self.inside["norm"]
        x = F.layer_norm(x * self.scales[1], (4,), norm.weight) + norm(x)
        return self.head(x.tanh())


class Tied(nn.Module):
    """An embedding that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.body = nn.Linear(4, 4)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)).tanh())


class Attention(nn.Module):
    """Attention, with and without weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        output, weights = self.attention(x, x, x)
        return output + self.attention(x, x, x, need_weights=False)[0] + weights.mean()


class Twice(nn.Sequential):
    """A layer in two places, called twice."""

    def __init__(self) -> None:
        norm = nn.LayerNorm(4)
        super().__init__(nn.Linear(4, 4), norm, nn.Tanh(), nn.Linear(4, 4), norm)


class Cell(nn.Module):
    """A recurrent model of a cell, which reads its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 3)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state


def encoder_layer(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=norm_first)


def convolutional() -> nn.Module:
    layers = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 1), nn.Flatten()
    return nn.Sequential(*layers)


class NormAct(nn.BatchNorm2d):
    """Norm and activation in one layer, as libraries of image models have it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        by_batch = self.training or self.running_mean is None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            by_batch,
            self.momentum,
            self.eps,
        )
        return self.act(x)


class ConvNeXtBlock(nn.Module):
    """LayerNorm over the channels of an image, and a scale for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(4)
        self.pointwise = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.pointwise(self.norm(y)).tanh().permute(0, 3, 1, 2)
        return x + self.scale * y


class Case(NamedTuple):
    """A model, the names that get rows, and the shape of an example; none for ids of tokens.

    Without names its norms get rows.
    """

    build: Callable[[], nn.Module]
    names: Any = None
    shape: tuple[int, ...] = (3, 4)


CASES = {
    "LayerNorm": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
        ["1.*"],
    ),
    "GroupNorm": Case(convolutional, ["1.*"], (2, 4, 4)),
    "convolution": Case(convolutional, ["0.weight", "3.bias"], (2, 4, 4)),
    "RMSNorm": Case(lambda: nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)), ["1.weight"]),
    "InstanceNorm": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.InstanceNorm1d(3, affine=True)), ["1.*"]
    ),
    "norm of another library": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), OwnNorm(4), nn.Linear(4, 2)), ["1.weight"]
    ),
    "attention": Case(Attention, ["*.in_proj_bias", "*.out_proj.*"]),
    "encoder layer": Case(
        lambda: encoder_layer(False), ["norm?.*", "linear1.weight", "self_attn.out_proj.bias"]
    ),
    "encoder layer, norm first": Case(lambda: encoder_layer(True), lambda name: "norm" in name),
    "parameters of its own": Case(Vision, ["place", "scales.?", "shifts.first", "*norm.weight"]),
    "shared layer": Case(Twice, ["1.*"]),
    "tied": Case(Tied, ["embedding.weight"], ()),
    "ConvNeXt": Case(ConvNeXtBlock, ["norm.*", "scale"], (4, 3, 3)),
    "all norms of a transformer": Case(lambda: nn.TransformerEncoder(encoder_layer(True), 2)),
    "InstanceNorm with statistics": Case(
        lambda: nn.Sequential(
            nn.Conv1d(3, 3, 1), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
        )
    ),
    "norm and activation": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), NormAct(4), nn.Conv2d(4, 2, 1)),
        shape=(2, 4, 4),
    ),
    "several norms": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.ReLU(), nn.RMSNorm(4)
        ),
        shape=(2, 4, 4),
    ),
    "cell": Case(Cell, ["cell.bias_*", "cell.weight_hh"]),
}


def built(case: Case) -> tuple[nn.Module, nn.Module, Batch]:
    """The plain model, one with rows no two of which are alike, and tasks."""
    torch.manual_seed(1)
    plain = case.build()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.2 * torch.randn_like(p))
    if case.names is None:
        net = mpp.convert_norm(plain, STEPS)
    else:
        net = mpp.per_step_parameters(plain, STEPS, case.names)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.shape != plain.get_parameter(name).shape:
                p.add_(0.3 * torch.randn_like(p))
    x, x_target = (
        torch.randn(TASKS, n, *case.shape) if case.shape else torch.randint(5, (TASKS, n, 2))
        for n in (3, 4)
    )
    return plain, net, (x, torch.randn(TASKS, 3), x_target, torch.randn(TASKS, 4))


def by_rows(plain: nn.Module, net: nn.Module, batch: Batch, order: bool) -> Found:
    """The ground truth: a plain model for each step, with rows in place of its own parameters."""
    own = dict(plain.named_parameters())
    learned = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    tables = [name for name, p in learned.items() if p.shape != own[name].shape]
    rest = [name for name in learned if name not in tables]
    rates = torch.linspace(0.5, 1.5, len(rest) * STEPS).view(-1, STEPS).mul(0.05).requires_grad_()
    plains = [copy.deepcopy(plain) for _ in range(STEPS)]  # each with statistics of its own

    def forward(weights: dict[str, Tensor], step: int, x: Tensor) -> Any:
        rows = {name: learned[name][step] for name in tables}
        with _reparametrize_module(plains[step], {**weights, **rows}, tie_weights=True):
            return plains[step](x)

    losses = []
    with sdpa_kernel(SDPBackend.MATH) if order else nullcontext():
        for x, y, x_target, y_target in zip(*batch, strict=True):
            weights = {name: learned[name] for name in rest}
            for step in range(STEPS):
                support = size_of_outputs(forward(weights, step, x), y)
                grads = torch.autograd.grad(support, [*weights.values()], create_graph=order)
                weights = {
                    name: weights[name] - rates[i, step] * grad
                    for i, (name, grad) in enumerate(zip(rest, grads, strict=True))
                }
                losses.append(size_of_outputs(forward(weights, step, x_target), y_target))
    loss = torch.stack(losses).mean()
    loss.backward()
    return {
        "loss": loss.detach(),
        "rates": rates.grad,
        **{name: p.grad for name, p in learned.items()},
        **{
            name: torch.stack([each.get_buffer(name) for each in plains])
            for name, _ in plain.named_buffers()
        },
    }


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # a cell's, under vmap
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_path_reads_the_rows_of_its_steps(case: Case, order: bool) -> None:
    plain, net, batch = built(case)
    expected = by_rows(plain, net, batch, order)
    for name in expected:  # torch's own InstanceNorm has a counter that it never moves
        if name.endswith("tracked"):
            expected[name] = torch.full((STEPS,), 2 * TASKS)
    for name, path in PATHS.items():
        try:
            assert_same(outcome(path, net, batch, second_order=order), expected)
        except Exception as error:
            raise AssertionError(name) from error
