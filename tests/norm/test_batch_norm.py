"""Each row of a per-step layer behaves as torch's own BatchNorm with that row's numbers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mamlpp_ext as mpp

pytestmark = pytest.mark.usefixtures("float64")

ROWS, CHANNELS = 3, 4
KINDS = {
    "1d": (mpp.PerStepBatchNorm1d, nn.BatchNorm1d, (6, CHANNELS)),
    "1d-length": (mpp.PerStepBatchNorm1d, nn.BatchNorm1d, (3, CHANNELS, 5)),
    "2d": (mpp.PerStepBatchNorm2d, nn.BatchNorm2d, (3, CHANNELS, 2, 3)),
    "3d": (mpp.PerStepBatchNorm3d, nn.BatchNorm3d, (2, CHANNELS, 2, 2, 3)),
}
SETTINGS = {
    "default": {},
    "cumulative": {"momentum": None},
    "momentum-0": {"momentum": 0.0},
    "momentum-1": {"momentum": 1.0},
    "no-affine": {"affine": False},
    "no-statistics": {"track_running_stats": False},
    "eps": {"eps": 0.3},
}


def pair(kind: str = "2d", **settings: Any) -> tuple[nn.Module, list[nn.Module], Tensor]:
    """A per-step layer, the plain layers that its rows are made of, and an input."""
    per_step, plain, shape = KINDS[kind]
    layer = per_step(CHANNELS, ROWS, **settings)
    plains = [plain(CHANNELS, **settings) for _ in range(ROWS)]
    for tensor in [t for p in plains for t in p.state_dict().values() if t.is_floating_point()]:
        tensor.uniform_(0.5, 1.5)
    states = [p.state_dict() for p in plains]
    layer.load_state_dict({k: torch.stack([s[k] for s in states]) for k in states[0]})
    return layer, plains, torch.randn(shape) * 2 + 1


def assert_rows_equal(layer: nn.Module, plains: list[nn.Module], **tolerance: float) -> None:
    for name, table in layer.state_dict().items():
        rows = torch.stack([p.state_dict()[name] for p in plains])
        torch.testing.assert_close(table, rows, **tolerance)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_plain_layers(kind: str, settings: dict[str, Any]) -> None:
    layer, plains, x = pair(kind, **settings)
    for mode in (True, False):
        layer.train(mode)
        for step in (0, 2, 1, 0, 0):  # some rows more often: each has a count of its own
            with mpp.at_step(layer, step):
                given = x * (step + 1)
                torch.testing.assert_close(layer(given), plains[step].train(mode)(given))
    assert_rows_equal(layer, plains)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_plain_layers(kind: str, mode: bool) -> None:
    layer, plains, x = pair(kind)
    x.requires_grad_()
    other, step = x.detach().clone().requires_grad_(), 1
    with mpp.at_step(layer, step):
        layer.train(mode)(x).pow(3).sum().backward()
    plains[step].train(mode)(other).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    for name, p in plains[step].named_parameters():
        grad = layer.get_parameter(name).grad
        torch.testing.assert_close(grad[step], p.grad)
        assert grad[[0, 2]].count_nonzero() == 0


def test_only_the_current_row_takes_statistics() -> None:
    layer, _, x = pair()
    before = copy.deepcopy(layer.state_dict())
    with mpp.at_step(layer, 1):
        layer(x)
    for name, table in layer.state_dict().items():
        moved = [not torch.equal(row, old) for row, old in zip(table, before[name], strict=True)]
        assert moved == [False, name not in ("weight", "bias"), False]


def test_statistics_count_each_forward_once() -> None:
    layer, _, x = pair()
    x.requires_grad_()
    counts = []
    (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    counts.append(layer.num_batches_tracked.tolist())
    grad.pow(2).sum().backward()  # neither backward may run the layer again
    counts.append(layer.num_batches_tracked.tolist())
    with torch.no_grad():
        layer(x)  # training mode without gradients still counts, as in torch
    counts.append(layer.num_batches_tracked.tolist())
    layer.eval()(x)
    counts.append(layer.num_batches_tracked.tolist())
    assert counts == [[1, 0, 0], [1, 0, 0], [2, 0, 0], [2, 0, 0]]


@pytest.mark.parametrize(("eps", "spread"), [(1e-5, 0.0), (0.3, 1e-3)])
def test_statistics_of_a_nearly_constant_channel(eps: float, spread: float) -> None:
    settings = {"eps": eps, "momentum": 1.0, "dtype": torch.float32}
    layer, plain = mpp.PerStepBatchNorm1d(4, 2, **settings), nn.BatchNorm1d(4, **settings)
    x = 1 + spread * torch.randn(50, 4, dtype=torch.float32)
    for each in (layer, plain):
        each(x)
    assert layer.running_var[0].min() >= 0
    torch.testing.assert_close(layer.running_var[0], plain.running_var, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_second_derivatives(mode: bool) -> None:
    layer, _, _ = pair("1d")
    layer.train(mode)
    tensors = (torch.randn(4, CHANNELS), layer.weight.data, layer.bias.data)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with mpp.frozen_statistics(layer) if mode else mpp.at_step(layer, 0):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    leaves = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(run, leaves)


def test_rows_beyond_the_last_reuse_it() -> None:
    layer, plains, x = pair()
    rows = layer.state_dict()
    layer = mpp.PerStepBatchNorm2d(CHANNELS, ROWS, extra_steps="last")
    layer.load_state_dict(rows)
    with mpp.at_step(layer, 10):
        torch.testing.assert_close(layer(x), plains[-1](x))
    assert_rows_equal(layer, plains)


def test_starts_as_plain_layers_start() -> None:
    layer = mpp.PerStepBatchNorm2d(CHANNELS, ROWS)
    assert_rows_equal(layer, [nn.BatchNorm2d(CHANNELS) for _ in range(ROWS)])
    layer, _, _ = pair()
    layer.reset_running_stats()
    assert layer.weight.sub(1).count_nonzero() > 0
    layer.reset_parameters()
    assert_rows_equal(layer, [nn.BatchNorm2d(CHANNELS) for _ in range(ROWS)])


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_channels_last_stays(settings: dict[str, Any], mode: bool) -> None:
    layer, plains, x = pair(**settings)
    x = x.contiguous(memory_format=torch.channels_last)
    output = layer.train(mode)(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, plains[0].train(mode)(x))


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(True, id="train"),
        pytest.param(False, id="eval"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_model(dtype: torch.dtype, mode: bool) -> None:
    layer, plains, x = pair()
    layer, plain, x = layer.to(dtype).train(mode), plains[0].to(dtype).train(mode), x.to(dtype)
    output, expected = layer(x), plain(x)
    torch.testing.assert_close(output, expected)  # dtype too
    assert_rows_equal(layer, [p.to(dtype) for p in plains])


def test_autocast() -> None:
    layer, plains, x = pair()
    layer, plain, x = layer.float(), plains[0].float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (x, x.bfloat16()):  # what a convolution hands over is bfloat16 there
            torch.testing.assert_close(layer(given), plain(given))
    assert layer.running_mean.dtype == torch.float32
    assert_rows_equal(layer, [p.float() for p in plains])


def test_device_and_dtype() -> None:
    layer = mpp.PerStepBatchNorm1d(CHANNELS, ROWS, device="meta", dtype=torch.bfloat16)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert {t.dtype for t in layer.parameters()} == {torch.bfloat16}


def copied(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer)


def pickled(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def reloaded(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = mpp.PerStepBatchNorm2d(CHANNELS, ROWS)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


def assigned(layer: nn.Module) -> nn.Module:
    twin = mpp.PerStepBatchNorm2d(CHANNELS, ROWS)
    twin.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    return twin


@pytest.mark.parametrize("again", [copied, pickled, reloaded, assigned])
def test_round_trips(again: Any, unchanged: Any) -> None:
    layer, _, x = pair()
    twin = again(layer)
    assert twin.state_dict().keys() == layer.state_dict().keys()
    for step in range(ROWS):
        with mpp.at_step(layer, step), mpp.at_step(twin, step):
            torch.testing.assert_close(twin(x), layer(x))
    with unchanged(layer), mpp.at_step(twin, 2):  # a step of its own, tables of its own
        twin(x).sum().backward()
        torch.optim.SGD(twin.parameters(), lr=1.0).step()


@pytest.mark.parametrize(
    "assign",
    [False, True],
)
def test_plain_checkpoint_is_spread_over_the_rows(assign: bool) -> None:
    _, (plain, *_), x = pair()
    checkpoint = nn.Sequential(nn.Identity(), plain).state_dict()
    before = copy.deepcopy(checkpoint)
    model = nn.Sequential(nn.Identity(), mpp.PerStepBatchNorm2d(CHANNELS, ROWS))
    model.load_state_dict(checkpoint, assign=assign)
    torch.testing.assert_close(dict(checkpoint), dict(before))  # the caller's stays plain
    assert_rows_equal(model[1], [plain] * ROWS)
    with mpp.at_step(model, 1):
        model(x).pow(2).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert model[1].num_batches_tracked.tolist() == [0, 1, 0]  # rows of their own, all writable


def test_plain_checkpoint_of_other_channels_is_refused(unchanged: Any) -> None:
    layer = mpp.PerStepBatchNorm2d(CHANNELS, ROWS)
    with unchanged(layer), pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(nn.BatchNorm2d(CHANNELS + 1).state_dict())


@pytest.mark.parametrize("channels", [1, 3])
def test_two_values_a_channel_are_enough(channels: int) -> None:
    layer = mpp.PerStepBatchNorm1d(channels, 2)
    x = torch.tensor([[1.0], [3.0]]).expand(2, channels)
    torch.testing.assert_close(layer(x), nn.functional.batch_norm(x, None, None, training=True))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x[:1])


@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=f"expects 3 channels in dimension 1, got {channels}"):
        mpp.PerStepBatchNorm1d(3, 2)(torch.randn(5, channels))


def test_many_channels() -> None:
    assert mpp.PerStepBatchNorm1d(300, 2)(torch.randn(5, 300)).shape == (5, 300)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_batches_taken_in_at_once_are_forwards_in_turn(momentum: float | None) -> None:
    layer = mpp.PerStepBatchNorm1d(CHANNELS, ROWS, momentum=momentum)
    layer(torch.randn(6, CHANNELS))
    twin, batches = copy.deepcopy(layer), torch.randn(3, 6, CHANNELS)
    for batch in batches:
        layer(batch)
    twin.absorb(0, batches.mean(1), batches.var(1))
    torch.testing.assert_close(dict(twin.named_buffers()), dict(layer.named_buffers()))


@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_contiguous(kind: str, second_order: bool) -> None:
    """torch's own kernel for [N, C] would read them wrongly."""
    layer, _, x = pair(kind)
    apart = torch.randn(ROWS, CHANNELS, 2)[..., 0]
    results = []
    for weight in (apart, apart.contiguous(), apart[:, :1].expand(-1, CHANNELS)):
        for value in (weight, weight.clone(memory_format=torch.contiguous_format)):
            for _ in mpp.inner_steps(layer, ROWS, second_order=second_order):
                leaf = x.clone().requires_grad_()
                y = torch.func.functional_call(layer, {"weight": value}, (leaf,))
            results.append(torch.autograd.grad(y.sin().sum(), leaf))
    for ours, expected in zip(results[::2], results[1::2], strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("second_order", [True, False])
def test_statistics_of_half_precision_without_weights_are_in_float32(second_order: bool) -> None:
    ours, plain = mpp.PerStepBatchNorm2d(4, 2, affine=False), nn.BatchNorm2d(4, affine=False)
    ours, plain = ours.float(), plain.float()
    for _ in range(50):
        x = (20 + torch.randn(8, 4, 3, 3)).bfloat16().requires_grad_()
        for _ in mpp.inner_steps(ours, 1, second_order=second_order):
            found = ours(x)
        expected = plain(x)
    torch.testing.assert_close(ours.running_mean[0], plain.running_mean)
    torch.testing.assert_close(ours.running_var[0], plain.running_var)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.float().sin().sum(), x) for y in (found, expected)]
    torch.testing.assert_close(*grads)
