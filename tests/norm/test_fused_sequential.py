"""FusedSequential is an nn.Sequential that nobody can tell from one but by the clock."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mamlpp_ext as mpp
from mamlpp_ext.norm import run

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(params=["as one", "one by one"], autouse=True)
def computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute what follows a convolution, whatever the size."""
    least = 0 if request.param == "as one" else 10**9
    monkeypatch.setattr(run, "_LEAST_AS_ONE", least)
    for name in ("_LEAST_FIRST_ORDER", "_LEAST_SECOND_ORDER"):
        monkeypatch.setattr(run, name, 0)


def block(source: int, filters: int, *others: nn.Module, **conv: Any) -> list[nn.Module]:
    return [nn.Conv2d(source, filters, 3, padding=1, **conv), nn.BatchNorm2d(filters), *others]


def make_net() -> nn.Module:
    """Runs of several kinds, in line and nested, and layers between them."""
    first = nn.Sequential(*block(2, 4, nn.ReLU(), nn.MaxPool2d(2)))
    second = nn.Sequential(*block(4, 4, nn.LeakyReLU(0.1), stride=(2, 1), dilation=2))
    last = block(3, 4, nn.MaxPool2d(3, 1, 1), nn.ReLU(inplace=True), groups=1, bias=False)
    between = [nn.Conv2d(4, 3, 1), nn.Tanh(), nn.Dropout2d(0.0)]
    net = nn.Sequential(first, second, *between, *last, nn.Flatten(), nn.Linear(24, 3))
    net = mpp.convert_batchnorm(net, 3)
    for layer in net.modules():
        if isinstance(layer, mpp.PerStepBatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_()
    return net


def plain(net: nn.Module) -> nn.Module:
    """The same with ``nn.Sequential`` in place of each FusedSequential."""
    net = copy.deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, mpp.FusedSequential):
            layer.__class__ = nn.Sequential
    return net


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collects the runs that are computed."""
    seen: list[Any] = []
    compute = run.Run.compute

    def counting(self: Any, features: Any) -> Any:
        found = compute(self, features)
        seen.extend([] if found is None else [self])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "compute", counting)
        yield seen


X = (5, 2, 10, 10)


def test_conversion_makes_it_of_sequentials_with_a_run_alone() -> None:
    inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    conv = nn.Sequential(*block(1, 2))
    net = nn.ModuleDict({"conv": nn.Sequential(conv), "other": nn.Sequential(inner)})
    converted = mpp.convert_batchnorm(net, 2)
    kinds = {name: type(layer) for name, layer in converted.named_modules()}
    assert kinds["conv"] is kinds["conv.0"] is mpp.FusedSequential
    assert kinds["other"] is kinds["other.0"] is nn.Sequential
    assert "FusedSequential(" in repr(converted)
    assert type(net["conv"]) is nn.Sequential


def test_subclasses_of_sequential_stay_what_they_are() -> None:
    class Own(nn.Sequential):
        pass

    assert type(mpp.convert_batchnorm(Own(*block(1, 2)), 2)) is Own


def test_it_has_sequentials_manners() -> None:
    net = mpp.FusedSequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.ReLU()))
    assert isinstance(net[:1], mpp.FusedSequential)
    assert [name for name, _ in net.named_children()] == ["conv", "norm"]
    net.append(nn.Flatten())
    assert net(torch.zeros(1, 1, 3, 3)).shape == (1, 2)
    assert mpp.FusedSequential()(3) == 3


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_values_derivatives_statistics_and_layouts(training, step, monkeypatch) -> None:
    net = make_net().train(training)
    x = torch.randn(X).requires_grad_()

    def found(model: nn.Module) -> list[Tensor]:
        with mpp.at_step(model, step):
            y = model(x)
        learned = [x, *model.parameters()]
        grads = torch.autograd.grad((y**2).sum(), learned, create_graph=True)
        value = sum((g**2).sum() for g in grads)
        # torch (2.13) returns second derivatives by a kernel transposed, ours are not.
        further = [g.contiguous() for g in torch.autograd.grad(value, learned)]
        return [y, *grads, *further, *model.buffers()]

    with counted(monkeypatch) as runs:
        ours = found(copy.deepcopy(net))
    assert len(runs) == (3 if training else 0)
    for a, b in zip(ours, found(plain(net)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        assert a.stride() == b.stride()


def test_first_order_computes_the_same(monkeypatch) -> None:
    net = make_net()
    x = torch.randn(X)

    def gradients(model: nn.Module) -> tuple[Tensor, ...]:
        for _ in mpp.inner_steps(model, 1, second_order=False):
            y = model(x)
        return torch.autograd.grad((y**2).sum(), list(model.parameters()))

    with counted(monkeypatch) as runs:
        ours = gradients(net)
    assert len(runs) == 3
    for a, b in zip(ours, gradients(plain(net)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("weights", ["mapped", "shared"])
@pytest.mark.parametrize("end", [3, 4, 5])
def test_layouts_within_vmap_are_torchs(end, weights) -> None:
    """At the end of a run, behind its norm, its activation or its pooling."""
    layers = [*block(2, 4, nn.ReLU(), nn.MaxPool2d(2)), *block(4, 4, nn.ReLU(), nn.MaxPool2d(2))]
    net = mpp.convert_batchnorm(nn.Sequential(*layers[: 3 + end]), 1, extra_steps="last")
    seen: list[Any] = []

    def strides(model: nn.Module) -> tuple[Any, Tensor]:
        def forward(params: dict[str, Tensor], x: Tensor) -> Tensor:
            y = functional_call(model, params, (x,))
            seen.append((y.stride(), y.is_contiguous()))
            return y

        params = {name: p.expand(3, *p.shape) for name, p in model.named_parameters()}
        if weights == "shared":
            params = {}
        with mpp.frozen_statistics(model):
            return seen, vmap(forward)(params, torch.ones(3, *X))

    with torch.random.fork_rng():
        ours, torchs = strides(net)[1], strides(plain(net))[1]
    torch.testing.assert_close(ours, torchs)
    assert seen[0] == seen[1]


def test_what_comes_out_is_nobody_elses() -> None:
    net = mpp.convert_batchnorm(nn.Sequential(*block(2, 4, nn.ReLU())), 1)
    x = torch.randn(X)
    y = net(x)
    expected = torch.autograd.grad((plain(net)(x) * 2).sum(), net[0].weight, allow_unused=True)[0]
    assert expected is None  # another model's
    assert y._base is None
    assert y._version == 0
    y.mul_(2)  # torch's ReLU would refuse its backward now, a copy need not
    torch.autograd.grad(y.sum(), net[0].weight)


def watched_by_hook(net: nn.Module, log: list[Any]) -> Any:
    net[0][1].register_forward_hook(lambda m, args, y: log.append((args[0].stride(), y.stride())))


def watched_by_pre_hook(net: nn.Module, log: list[Any]) -> Any:
    net[0][3].register_forward_pre_hook(lambda m, args: log.append(args[0].stride()))


def watched_by_backward_hook(net: nn.Module, log: list[Any]) -> Any:
    net[0][0].register_full_backward_hook(lambda m, i, o: log.append(o[0].stride()))


def watched_by_global_hook(net: nn.Module, log: list[Any]) -> Any:
    return nn.modules.module.register_module_forward_hook(
        lambda m, args, y: log.append((type(m).__name__, y.stride()))
    )


def changed_by_hook(net: nn.Module, log: list[Any]) -> Any:
    net[0][0].register_forward_hook(lambda m, args, y: 2 * y + 1)


def wrapped_forward(net: nn.Module, log: list[Any]) -> Any:
    forward = net[0][0].forward
    net[0][0].forward = lambda x: forward(x) + 1


def of_a_subclass(net: nn.Module, log: list[Any]) -> Any:
    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3

    net[0][0].__class__ = Scaled


def parametrized(net: nn.Module, log: list[Any]) -> Any:
    parametrizations.weight_norm(net[0][0])


def pruned(net: nn.Module, log: list[Any]) -> Any:
    prune.l1_unstructured(net[0][0], "weight", amount=0.5)


def circular(net: nn.Module, log: list[Any]) -> Any:
    net[0][0] = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")


def padded_alike(net: nn.Module, log: list[Any]) -> Any:
    net[0][0] = nn.Conv2d(2, 4, 3, padding="same")


def pooled_with_indices(net: nn.Module, log: list[Any]) -> Any:
    class First(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0]

    net[0][3].return_indices = True
    net[0].append(First())


CHANGES = [
    watched_by_hook,
    watched_by_pre_hook,
    watched_by_backward_hook,
    watched_by_global_hook,
    changed_by_hook,
    wrapped_forward,
    of_a_subclass,
    parametrized,
    pruned,
    circular,
    padded_alike,
    pooled_with_indices,
]


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_somebody_watches_or_changed_are_called(change: Callable[..., Any]) -> None:
    x = torch.randn(X).requires_grad_()

    def result(model: nn.Module) -> tuple[Tensor, Tensor, list[Any]]:
        log: list[Any] = []
        torch.manual_seed(0)
        handle = change(model, log)
        try:
            y = model(x)
            grads = torch.autograd.grad((y**2).sum(), list(model.parameters()))
        finally:
            if handle is not None:
                handle.remove()
        return y, torch.cat([g.flatten() for g in grads]), log

    net = make_net()
    ours, torchs = result(copy.deepcopy(net)), result(plain(net))
    torch.testing.assert_close(ours[:2], torchs[:2], rtol=1e-7, atol=1e-9)
    names = {"FusedSequential": "Sequential"}
    log = [(names.get(a, a), b) if isinstance(a, str) else (a, b) for a, b in map(as_pair, ours[2])]
    assert log == [as_pair(entry) for entry in torchs[2]]


def as_pair(entry: Any) -> tuple[Any, Any]:
    return entry if len(entry) == 2 else (entry, None)


class Doubling(TorchFunctionMode):
    """Doubles what ReLUs return."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return y * 2 if func is F.relu else y


class Logging(TorchDispatchMode):
    """Says which operations there were."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_each_call() -> None:
    net, x = make_net(), torch.randn(X)
    with Doubling():
        ours = net(x)
    with Doubling():
        torchs = plain(net)(x)
    torch.testing.assert_close(ours, torchs)
    logs = [Logging(), Logging()]
    for model, log in zip((net, plain(net)), logs, strict=True):
        with log:
            model(x)
    assert logs[0].names == logs[1].names


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_without_gradients(context, monkeypatch) -> None:
    net, x = make_net(), torch.randn(X)
    with context(), counted(monkeypatch) as runs:
        ours = net(x)
    assert len(runs) == 3
    torch.testing.assert_close(ours, plain(net)(x))
    assert ours.is_inference() == (context is torch.inference_mode)


@pytest.mark.parametrize(
    "change",
    [
        lambda net, x: x.contiguous(memory_format=torch.channels_last),
        lambda net, x: x.transpose(2, 3),
        lambda net, x: x[..., 1:9, 1:9],
        lambda net, x: x[:, :1].expand(X),
        lambda net, x: x[1:],
        lambda net, x: x[0],
        lambda net, x: (net.to(torch.bfloat16), x.to(torch.bfloat16))[1],
        lambda net, x: (net.to(memory_format=torch.channels_last), x)[1],
    ],
)
def test_other_inputs_and_weights(change) -> None:
    net, x = make_net()[:2], torch.randn(X)
    torchs_net = plain(net)
    ours_x, torchs_x = change(net, x), change(torchs_net, x)
    if ours_x.dim() == 3:
        with pytest.raises(ValueError, match="expects input of shape"):
            net(ours_x)
        return
    ours, torchs = net(ours_x), torchs_net(torchs_x)
    torch.testing.assert_close(ours, torchs)
    assert ours.stride() == torchs.stride()
    assert ours.dtype == torchs.dtype


def test_autocast_is_left_to_torch() -> None:
    net, x = make_net().float()[:1], torch.randn(X, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x).dtype == plain(net)(x).dtype


def test_an_inplace_change_of_what_a_backward_needs_is_torchs_error() -> None:
    for model in (make_net(), plain(make_net())):
        loss = model(torch.randn(X)).sum()
        with torch.no_grad():
            model[0][0].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_small_images_are_left_to_torchs_layers(monkeypatch) -> None:
    net, x = make_net(), torch.randn(X)
    monkeypatch.setattr(run, "_LEAST_SECOND_ORDER", 5 * 4 * 10 * 10 + 1)
    with counted(monkeypatch) as runs:
        net(x)
    assert runs == []


@pytest.mark.parametrize(
    ("first_order", "pooled", "computed_as_run"),
    [(True, False, False), (True, True, True), (False, False, True)],
)
def test_first_order_leaves_many_channels_without_pooling_to_torchs_layers(
    first_order, pooled, computed_as_run, monkeypatch
) -> None:
    monkeypatch.setattr(run, "has_slow_weight_gradient", lambda x, w: True)
    layers = block(2, 4, nn.ReLU(), *[nn.MaxPool2d(2)] * pooled)
    net, x = mpp.convert_batchnorm(nn.Sequential(*layers), 1), torch.randn(X)
    with counted(monkeypatch) as runs:
        for _ in mpp.inner_steps(net, 1, second_order=not first_order):
            y = net(x)
    assert bool(runs) == computed_as_run
    torch.testing.assert_close(y, plain(net)(x))


@pytest.mark.parametrize("size", [(2, 3, 8, 8), (2, 2, 0, 0), (2, 2, 1)])
def test_errors_are_torchs(size) -> None:
    net = mpp.convert_batchnorm(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), 1)
    with pytest.raises(RuntimeError) as expected:
        plain(net)(torch.ones(size))
    with pytest.raises(RuntimeError) as found:
        net(torch.ones(size))
    assert str(found.value) == str(expected.value)


def test_copies_pickles_and_checkpoints(unchanged: Any) -> None:
    net, x = make_net(), torch.randn(X)
    with mpp.frozen_statistics(net):
        expected = net(x)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    copies = (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(file, weights_only=False),
    )
    for other in copies:
        assert isinstance(other, mpp.FusedSequential)
        with unchanged(other), mpp.frozen_statistics(other):
            torch.testing.assert_close(other(x), expected)
    other = plain(make_net())
    other.load_state_dict(net.state_dict())
    with mpp.frozen_statistics(other):
        torch.testing.assert_close(other(x), expected)


def test_parameters_given_to_a_patched_model_reach_fused_layers(monkeypatch) -> None:
    pytest.importorskip("higher")
    from mamlpp_ext.integrations.higher import innerloop_ctx

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.others = make_net(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.others(self.first(x))

    net, x = Model(), torch.randn(X)
    others = [p.detach() * 1.5 for p in net.parameters()]
    twin = plain(net)
    for p, other in zip(twin.parameters(), others, strict=True):
        p.data = other
    with counted(monkeypatch) as runs, innerloop_ctx(net, mpp.LSLR(net, 3)) as (fnet, _):
        torch.testing.assert_close(fnet(x, params=others), twin(x))
        torch.testing.assert_close(fnet.first(x, params=others), twin.first(x))
    assert len(runs) == 6


def test_higher_without_the_adapter_calls_the_layers(monkeypatch) -> None:
    higher = pytest.importorskip("higher")
    net, x = make_net(), torch.randn(X)
    others = [p.detach() * 1.5 for p in net.parameters()]
    twin = plain(net)
    for p, other in zip(twin.parameters(), others, strict=True):
        p.data = other
    with counted(monkeypatch) as runs:
        fnet = higher.patch.make_functional(net)
        higher.patch.buffer_sync(net, fnet)
        torch.testing.assert_close(fnet(x, params=others), twin(x))
    assert runs == []


# Dynamo looks at every attribute of what it is called with.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_torch_compile_traces_it_whole() -> None:
    net, x = make_net(), torch.randn(X)
    with mpp.frozen_statistics(net):
        expected = net(x)
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


def test_fx_traces_it() -> None:
    net, x = make_net().eval(), torch.randn(X)
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda module, _: not isinstance(module, nn.Sequential)
    traced = torch.fx.GraphModule(net, tracer.trace(net))
    torch.testing.assert_close(traced(x), net(x))
