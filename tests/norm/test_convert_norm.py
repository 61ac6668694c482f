"""convert_norm gives rows to every norm of torch's, and computes what the norm did."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp

pytestmark = pytest.mark.usefixtures("float64")

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (2, 3, 4)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (2, 4, 3, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (2, 4, 2, 2, 2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (2, 4, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (2, 4, 3, 3)),
    "InstanceNorm1d with statistics": (
        lambda: nn.InstanceNorm1d(4, track_running_stats=True),
        (2, 4, 3),
    ),
    "InstanceNorm2d with statistics": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        (2, 4, 3, 3),
    ),
    "InstanceNorm3d with statistics": (
        lambda: nn.InstanceNorm3d(4, momentum=0.3, track_running_stats=True),
        (2, 4, 2, 2, 2),
    ),
    "InstanceNorm without momentum": (
        lambda: nn.InstanceNorm1d(4, momentum=None, track_running_stats=True),
        (2, 4, 3),
    ),
    "InstanceNorm of one": (
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        (4, 3),
    ),
}


def other_numbers(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            if t.is_floating_point():
                t.add_(0.2 + 0.3 * torch.rand_like(t))
    return layer


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("build", "shape"), NORMS.values(), ids=NORMS)
def test_every_step_is_the_plain_norm(
    build: Callable[[], nn.Module], shape: tuple[int, ...], training: bool
) -> None:
    plain = other_numbers(build()).train(training)
    net = mpp.convert_norm(plain, 3)
    other_numbers(net)
    plains = [copy.deepcopy(plain) for _ in range(3)]
    for step, each in enumerate(plains):
        table = dict(net.state_dict())
        each.load_state_dict({name: table[name][step] for name in each.state_dict()})
    for step in (0, 1, 2, 0, 1, 2):
        x = torch.randn(shape)
        with mpp.at_step(net, step):
            torch.testing.assert_close(net(x), plains[step](x))
    for name, table in net.state_dict().items():
        if not name.endswith("tracked"):  # which torch's InstanceNorm never moves
            rows = torch.stack([each.state_dict()[name] for each in plains])
            torch.testing.assert_close(table, rows)


def conv4() -> nn.Sequential:
    def block(channels: int) -> nn.Sequential:
        conv, norm = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        return nn.Sequential(conv, norm, nn.ReLU(), nn.MaxPool2d(2))

    return nn.Sequential(*map(block, (1, 8, 8, 8)), nn.Flatten(), nn.Linear(8, 5))


def test_batch_norm_becomes_what_convert_batchnorm_makes_of_it() -> None:
    plain = conv4()
    found, expected = mpp.convert_norm(plain, 3), mpp.convert_batchnorm(plain, 3)
    assert [type(m) for m in found.modules()] == [type(m) for m in expected.modules()]
    assert {type(m) for m in found} >= {mpp.FusedSequential}
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, t in found.state_dict().items():
        torch.testing.assert_close(t, expected.state_dict()[name], rtol=0, atol=0)
    assert repr(found) == repr(expected)


def test_a_transformer_has_rows_in_its_norms_alone() -> None:
    plain = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 2, nn.LayerNorm(4)
    )
    net = mpp.convert_norm(plain, 3)
    tables = {n for n, p in net.named_parameters() if p.shape != plain.get_parameter(n).shape}
    assert tables == {n for n, _ in plain.named_parameters() if "norm" in n}
    assert set(mpp.LSLR(net, 3).names) == {n for n, _ in plain.named_parameters()} - tables


def test_norms_share_a_counter_and_settings() -> None:
    statistics = nn.InstanceNorm1d(4, track_running_stats=True)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4), statistics)
    net = mpp.convert_norm(net, 3, extra_steps="last")
    assert len({id(layer.inner_step) for layer in net}) == 1
    assert {(layer.num_steps, layer.extra_steps) for layer in net} == {(3, "last")}
    with mpp.at_step(net, 9):
        net(torch.randn(2, 4, 4))
    assert net[0].num_batches_tracked.tolist() == [0, 0, 1]
    assert net[2].num_batches_tracked.tolist() == [0, 0, 1]


def test_what_has_rows_already_keeps_them() -> None:
    net = mpp.per_step_parameters(nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)), 3, ["0.*"])
    other_numbers(net)
    again = mpp.convert_norm(net, 3)
    torch.testing.assert_close(again[0].weight, net[0].weight, rtol=0, atol=0)
    assert again[1].weight.shape == (3, 4)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_frozen_statistics_of_instance_norm(training: bool) -> None:
    plain = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    net, x = mpp.convert_norm(plain, 3).train(training), torch.randn(2, 4, 3)
    before = copy.deepcopy(net.state_dict())
    with mpp.frozen_statistics(net):
        torch.testing.assert_close(net(x), plain.train()(x))
    for name, t in net.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0)


def test_instance_norm_travels_and_takes_a_plain_checkpoint() -> None:
    plain = other_numbers(nn.InstanceNorm1d(4, affine=True, track_running_stats=True))
    net = mpp.convert_norm(plain, 3)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(again) is type(net)
        assert repr(again) == repr(net)
        assert "num_steps=3, extra_steps='error'" in repr(again)
        other_numbers(again)
        again.load_state_dict(plain.state_dict())
        for name, t in plain.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], t.expand(3, *t.shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_of_instance_norm(dtype: torch.dtype) -> None:
    plain = other_numbers(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)).to(dtype)
    net, x = mpp.convert_norm(plain, 3), torch.randn(2, 4, 5, dtype=dtype)
    assert {t.dtype for t in net.state_dict().values() if t.is_floating_point()} == {dtype}
    for training in (True, False):
        found, expected = net.train(training)(x), plain.train(training)(x)
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


# ---------------------------------------------------------------------------------------------
# Layers that add to BatchNorm.


class NormAct(nn.BatchNorm1d):
    """Norm and activation in one layer."""

    def __init__(self, channels: int, act: nn.Module | None = None, **settings: Any) -> None:
        super().__init__(channels, **settings)
        self.act = nn.ReLU() if act is None else act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class Renamed(nn.BatchNorm1d):
    """The same by another name."""


class Gated(nn.BatchNorm1d):
    """A parameter of its own, and another argument."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gate = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, input: Tensor, times: float = 1.0) -> Tensor:
        return times * super().forward(input) * self.gate.sigmoid()


SUBCLASSES: dict[str, Callable[[], nn.Module]] = {
    "activation": lambda: NormAct(4),
    "learned activation": lambda: NormAct(4, nn.PReLU(init=0.3)),
    "no affine": lambda: NormAct(4, affine=False),
    "no statistics": lambda: NormAct(4, track_running_stats=False),
    "cumulative": lambda: NormAct(4, momentum=None),
    "by another name": lambda: Renamed(4),
    "a parameter more": lambda: Gated(4),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("build", SUBCLASSES.values(), ids=SUBCLASSES)
@pytest.mark.parametrize("convert", [mpp.convert_norm, mpp.convert_batchnorm])
def test_subclasses_that_add_to_batch_norm(
    convert: Callable[..., nn.Module], build: Callable[[], nn.Module], training: bool
) -> None:
    plain = other_numbers(build()).train(training)
    seed = torch.get_rng_state()
    net = convert(plain, 3)
    assert torch.equal(torch.get_rng_state(), seed)
    assert isinstance(net, mpp.PerStepBatchNorm1d)
    assert isinstance(net, type(plain))
    plains = [copy.deepcopy(plain) for _ in range(3)]
    for step in (0, 1, 2, 0, 1, 2):
        x = torch.randn(3, 4)
        with mpp.at_step(net, step):
            torch.testing.assert_close(net(x), plains[step](x))
    for name, t in net.state_dict().items():
        rows = [each.state_dict()[name] for each in plains]
        torch.testing.assert_close(t, rows[0] if t.shape == rows[0].shape else torch.stack(rows))
    tables = {"weight", "bias"} & {name for name, _ in plain.named_parameters()}
    assert {n for n, p in net.named_parameters() if p.shape[:1] == (3,)} == tables


def test_arguments_of_a_subclass_are_handed_on() -> None:
    net, x = mpp.convert_norm(Gated(4), 3).eval(), torch.randn(3, 4)
    torch.testing.assert_close(net(x, times=3.0), 3 * net(x))
    torch.testing.assert_close(net(x, 3.0), 3 * net(x))


def test_a_subclass_keeps_its_hooks_and_travels() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), NormAct(4, nn.PReLU()))
    plain[1].register_forward_hook(lambda layer, args, output: output + 1)
    net = mpp.convert_norm(plain, 3)
    x = torch.randn(3, 4)
    torch.testing.assert_close(copy.deepcopy(net)(x), copy.deepcopy(plain)(x))
    plain[1]._forward_hooks.clear()  # a lambda does not pickle
    net = mpp.convert_norm(mpp.per_step_parameters(plain, 3, ["1.act.weight"]), 3)
    again = pickle.loads(pickle.dumps(net))
    assert type(again[1]) is type(net[1])
    assert again[1].act.weight.shape == (3, 1)
    for step in mpp.inner_steps(net, 3):
        with mpp.at_step(again, step):
            torch.testing.assert_close(again(x), net(x))


def test_rows_for_what_a_subclass_adds() -> None:
    plain = mpp.convert_norm(NormAct(4, nn.PReLU()), 3)
    net = mpp.per_step_parameters(nn.Sequential(plain), 3, ["0.act.weight"])
    with torch.no_grad():
        net[0].act.weight.copy_(torch.tensor([[0.0], [0.5], [1.0]]))
    x = torch.randn(3, 4)
    for step in mpp.inner_steps(net, 3):
        expected = F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.5 * step)
        torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("settings", [{"num_steps": 3}, {"num_steps": 1, "extra_steps": "last"}])
def test_what_task_batch_loss_says_of_running_statistics_helps(settings: dict[str, Any]) -> None:
    norm = nn.InstanceNorm1d(4, track_running_stats=True)
    plain = nn.Sequential(nn.Conv1d(3, 4, 1), norm, nn.Flatten(), nn.Linear(20, 2))
    examples = torch.randn(2, 3, 3, 5), torch.zeros(2, 3, dtype=torch.long)

    def run(net: nn.Module) -> None:
        lslr = mpp.LSLR(net, 3)
        mpp.task_batch_loss(net, lslr, examples * 2, F.cross_entropy, num_steps=3).loss.backward()

    with pytest.raises(ValueError, match=r"convert_norm\(model, num_steps\)"):
        run(plain)
    net = mpp.convert_norm(plain, **settings)
    run(net)
    assert net[1].num_batches_tracked.sum() == 12  # two tasks, three steps, two forwards in each
    assert net[1].running_mean.count_nonzero() == net[1].running_mean.numel()
