"""convert_batchnorm returns a copy that computes the same, or refuses and leaves no trace."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mamlpp_ext as mpp

pytestmark = pytest.mark.usefixtures("float64")

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PER_STEP = (mpp.PerStepBatchNorm1d, mpp.PerStepBatchNorm2d, mpp.PerStepBatchNorm3d)


class Block(nn.Module):
    """A nested model whose second layer and its norm stand in two places."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3, **norm), nn.ReLU())
        self.twice = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 1), "norm": nn.BatchNorm2d(3, **norm)})
        self.again = self.twice
        self.same_norm = self.twice["norm"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.twice["norm"](self.twice["conv"](x))
        return self.same_norm(self.again["conv"](x))


def trained(**norm: Any) -> tuple[Block, Tensor]:
    """A block whose weights and statistics are not the initial ones."""
    model, x = Block(**norm), torch.randn(5, 1, 4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x + 1).pow(2).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, x


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "norm",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.5}],
    ids=["default", "no-affine", "no-statistics", "cumulative", "eps"],
)
def test_every_step_computes_the_original(norm: dict[str, Any], mode: bool) -> None:
    model, x = trained(**norm)
    converted = mpp.convert_batchnorm(model.train(mode), 3)
    states = []
    for step in range(3):
        reference, twin = copy.deepcopy(model), copy.deepcopy(converted)
        with mpp.at_step(twin, step):
            torch.testing.assert_close(twin(x), reference(x))
        states.append((reference.state_dict(), twin.state_dict()))
    for step, (plain, per_step) in enumerate(states):  # one further forward moved that row alike
        for name, value in plain.items():
            table = per_step[name]
            row = table[step] if table.dim() > value.dim() else table
            torch.testing.assert_close(row, value)


def test_original_is_untouched(unchanged: Any) -> None:
    model, x = trained()
    with unchanged(model):
        converted = mpp.convert_batchnorm(model, 3)
        converted(x).sum().backward()
        torch.optim.SGD(converted.parameters(), lr=1.0).step()


def test_shared_layer_has_one_replacement() -> None:
    converted = mpp.convert_batchnorm(Block(), 3)
    assert converted.same_norm is converted.twice["norm"] is converted.again["norm"]
    assert converted.again is converted.twice
    assert isinstance(converted.same_norm, mpp.PerStepBatchNorm2d)
    norms = [m for m in converted.modules() if isinstance(m, PER_STEP)]
    assert len(norms) == 2
    assert not [m for m in converted.modules() if isinstance(m, PLAIN)]
    assert norms[0].inner_step is norms[1].inner_step  # one loop drives them all


@pytest.mark.parametrize(("plain", "per_step"), [*zip(PLAIN, PER_STEP, strict=True)])
def test_settings_are_kept(plain: type[nn.Module], per_step: type[nn.Module]) -> None:
    layer = plain(4, eps=0.01, momentum=None, affine=False, track_running_stats=False)
    converted = mpp.convert_batchnorm(layer, 2, extra_steps="last")  # the layer itself is the root
    assert type(converted) is per_step
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats")
    assert [getattr(converted, n) for n in names] == [getattr(layer, n) for n in names]
    assert (converted.num_steps, converted.extra_steps) == (2, "last")


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_requires_grad_is_kept(frozen: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4))
    model[0].get_parameter(frozen).requires_grad_(False)
    converted = mpp.convert_batchnorm(model, 2)
    assert {n: p.requires_grad for n, p in converted[0].named_parameters()} == {
        n: n != frozen for n in ("weight", "bias")
    }


def test_mode_is_kept_layer_by_layer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.BatchNorm1d(4))
    model[0].eval()
    model[1].eval()
    assert [m.training for m in mpp.convert_batchnorm(model, 2)] == [False, False, True]
    assert not mpp.convert_batchnorm(model.eval(), 2).training


@pytest.mark.parametrize("norm", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype: torch.dtype, norm: dict[str, Any]) -> None:
    model = Block(**norm).to(dtype)
    converted = mpp.convert_batchnorm(model, 2)
    old, new = model.state_dict(), converted.state_dict()
    assert {n: t.dtype for n, t in new.items()} == {n: t.dtype for n, t in old.items()}


def test_device_is_kept() -> None:
    converted = mpp.convert_batchnorm(nn.Sequential(nn.BatchNorm1d(4, device="meta")), 2)
    assert {t.device.type for t in converted.state_dict().values()} == {"meta"}


def test_one_row_for_all_steps_is_plain_batchnorm() -> None:
    model, x = trained()
    converted = mpp.convert_batchnorm(model, 1, extra_steps="last")
    for step in mpp.inner_steps(converted, 4):
        torch.testing.assert_close(converted(x + step), model(x + step))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name].view_as(value), value)


def test_without_statistics_as_functorch_advises() -> None:
    model, x = trained()
    for norm in (model.stem[1], model.same_norm):  # what its batch-norm patch does to a layer
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        norm.track_running_stats = False
    torch.testing.assert_close(mpp.convert_batchnorm(model, 2)(x), model(x))


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_without_bias(mode: bool) -> None:
    model, x = trained()
    for norm in (model.stem[1], model.same_norm):  # torch's bias=False, in any version
        norm.register_parameter("bias", None)
    converted = mpp.convert_batchnorm(model.train(mode), 2)
    torch.testing.assert_close(converted(x), model(x))
    assert {name for name, _ in converted.named_parameters()} == {
        name for name, _ in model.named_parameters()
    }


def test_plain_layers_beside_converted_ones_are_converted() -> None:
    mixed = nn.Sequential(mpp.PerStepBatchNorm1d(4, 2), nn.BatchNorm1d(4))
    converted = mpp.convert_batchnorm(mixed, 2)
    for step in mpp.inner_steps(converted, 2):  # the two counters go together
        converted(torch.randn(3, 4))
        assert [layer.num_batches_tracked[step].item() for layer in converted] == [1, 1]


def test_each_replacement_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mamlpp_ext.norm.convert_batch_norm"):
        mpp.convert_batchnorm(Block(), 3)
        mpp.convert_batchnorm(nn.BatchNorm1d(4), 3)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3  # the shared layer once
    for line, words in zip(lines, ("stem.1", "twice.norm", "(root)"), strict=True):
        assert line.startswith(f"{words} -> PerStepBatchNorm")
        assert "num_steps=3" in line


class Doubled(nn.BatchNorm1d):
    """A user's own subclass, which computes something else than batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2 * input)


def hooked(register: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        getattr(model[1], register)(lambda *args: None)
        return model

    return build


def flag_cleared() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.track_running_stats = False  # net.apply(...) of many MAML scripts; the buffers stay
    return layer


def buffers_removed() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.running_mean = layer.running_var = None
    return layer


def tied() -> nn.Module:
    layers = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    layers[1].weight = layers[0].weight
    return layers


REFUSALS = {
    "sync": (lambda: nn.SyncBatchNorm(4), "nn.BatchNorm1d, 2d and 3d"),
    "lazy": (nn.LazyBatchNorm1d, "run the model once"),
    "subclass": (lambda: Doubled(4), "replace it with the BatchNorm it is made of"),
    "instance norm only": (lambda: nn.InstanceNorm1d(4), "has no nn.BatchNorm1d, 2d or 3d"),
    "converted": (lambda: mpp.PerStepBatchNorm1d(4, 2), "converted already"),
    "flag without effect": (flag_cleared, "track_running_stats=False with running buffers"),
    "statistics removed": (buffers_removed, "track_running_stats=True without running"),
    "tied": (tied, "shares its weight or bias with another layer"),
    "forward hook": (hooked("register_forward_hook"), "has hooks"),
    "forward pre-hook": (hooked("register_forward_pre_hook"), "has hooks"),
    "backward hook": (hooked("register_full_backward_hook"), "has hooks"),
    "backward pre-hook": (hooked("register_full_backward_pre_hook"), "has hooks"),
}


@pytest.mark.parametrize(("build", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_leave_the_model_alone(
    build: Callable[[], nn.Module], words: str, unchanged: Any
) -> None:
    plain = [nn.BatchNorm1d(4)] if "no nn.BatchNorm" not in words and "already" not in words else []
    model = nn.Sequential(*plain, build())
    with unchanged(model), pytest.raises(ValueError, match=words):
        mpp.convert_batchnorm(model, 2)


def test_what_cannot_be_copied_is_left_alone(unchanged: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4)))
    model[1].source = (step for step in ())  # generators cannot be copied
    with unchanged(model), pytest.raises(ValueError, match=r"'1.source' is in the way, of type"):
        mpp.convert_batchnorm(model, 2)


class RefersToNorm(nn.Module):
    """Calls its norm by what it holds besides it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        norm = self.norm
        self.call = {
            "method": norm.forward,
            "function": lambda x: norm(x),
            "partial": functools.partial(nn.Module.__call__, norm),
            "list": [norm],
        }[way]

    def forward(self, x: Tensor) -> Tensor:
        call = self.call[0] if isinstance(self.call, list) else self.call
        return call(self.body(x))


@pytest.mark.parametrize("way", ["method", "function", "partial", "list"])
def test_what_refers_to_a_norm_refers_to_the_converted_one(way: str) -> None:
    model = RefersToNorm(way)
    model.norm.eps = 0.5
    converted, x = mpp.convert_batchnorm(model, 3), torch.randn(8, 3)
    for step in mpp.inner_steps(converted, 3):
        torch.testing.assert_close(converted(x), model.norm(model.body(x)))
        assert converted.norm.num_batches_tracked.tolist() == [1] * (step + 1) + [0] * (2 - step)


def test_a_wrapped_forward_of_the_copy_calls_the_copy(unchanged: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    inner = model.forward
    model.forward = lambda x: 2 * inner(x)
    converted, x = mpp.convert_batchnorm(model, 3), torch.randn(8, 3)
    with unchanged(model):
        found = converted(x)
    assert converted[1].num_batches_tracked.tolist() == [1, 0, 0]
    torch.testing.assert_close(found, model(x))


def test_inside_frozen_statistics(unchanged: Any) -> None:
    model, _ = trained()
    with unchanged(model), mpp.frozen_statistics(model):
        with pytest.raises(ValueError, match="inside frozen_statistics; convert the model before"):
            mpp.convert_batchnorm(model, 2)


def test_statistics_keep_a_dtype_of_their_own() -> None:
    plain = nn.BatchNorm1d(4).float()
    plain.running_mean.fill_(1.2345678)
    plain.weight.data, plain.bias.data = plain.weight.bfloat16(), plain.bias.bfloat16()
    layer = mpp.convert_batchnorm(plain, 3)
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.running_mean, plain.running_mean.expand(3, 4), rtol=0, atol=0)
