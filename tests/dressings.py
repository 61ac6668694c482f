"""How people dress a module, and what each one's forward is, written out by hand.

The model under every dress is ``head(tanh(body(x)))``. What is written out takes weights by name,
an input, and a dict in which it may keep what the forward keeps.
"""

from __future__ import annotations

import abc
import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

Weights = dict[str, Tensor]
Kept = dict[str, Tensor]


class Net(nn.Module):
    """A body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def written_out(
    w: Weights, x: Tensor, body: Tensor | None = None, head: Tensor | None = None, prefix: str = ""
) -> Tensor:
    """Returns the logits, with another weight for a layer where it is given."""
    body = w[f"{prefix}body.weight"] if body is None else body
    head = w[f"{prefix}head.weight"] if head is None else head
    hidden = torch.tanh(x @ body.T + w[f"{prefix}body.bias"])
    return hidden @ head.T + w[f"{prefix}head.bias"]


# How each path is named that refuses a dress, and a part of its words with what to do instead.
Refusals = tuple[tuple[str, str], ...]
PATHS = (
    "higher",
    "torchopt",
    "plain loop",
    "task_batch_loss",
    "chunk_size=1",
    "rematerialize",
)
BY_HIGHER: Refusals = (("higher", "higher cannot patch this"),)
# What torch 2.6 makes of a model to compile it can be patched, and is right.
COMPILED: Refusals = () if torch.__version__.startswith("2.6.") else BY_HIGHER
BY_VMAP: Refusals = (("task_batch_loss", "pass chunk_size=1"),)


class Dress(NamedTuple):
    """One way to dress the model.

    Attributes:
        make: returns the dressed model.
        forward: ``(weights, x, kept) -> logits``, by hand.
        refused: each path that refuses it, and by which words; the others are right.
    """

    make: Callable[[], nn.Module]
    forward: Callable[[Weights, Tensor, Kept], Tensor]
    refused: Refusals = ()


def plainly(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    return written_out(w, x)


def under(prefix: str) -> Callable[[Weights, Tensor, Kept], Tensor]:
    return lambda w, x, kept: written_out(w, x, prefix=prefix)


# -- hooks -----------------------------------------------------------------------------------------


def with_hook(register: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = Net()
        register(net)
        return net

    return make


def twice(*args: Any) -> Any:
    return 2 * args[-1]


def doubled(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    return 2 * written_out(w, x)


def halved_gradient(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * x.detach()


def pre_hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tuple(3 * a for a in args), kwargs


def hooked_backward(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    hidden = halved_gradient(torch.tanh(x @ w["body.weight"].T + w["body.bias"]))
    return hidden @ w["head.weight"].T + w["head.bias"]


def hooked_before(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    hidden = torch.tanh(halved_gradient(x @ w["body.weight"].T + w["body.bias"]))
    return hidden @ w["head.weight"].T + w["head.bias"]


class Remembering(Net):
    """A hook of its own keeps what the forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.hidden = torch.tanh(output)

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.head(self.hidden)


def hook_that_captures() -> nn.Module:
    net = Net()
    net.head.register_forward_hook(lambda module, args, output: output + net.head.bias)
    return net


# -- weights that are computed ---------------------------------------------------------------------


def dressed(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = Net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch calls deprecated, and people use
            change(net)
        return net

    return make


class Symmetric(nn.Module):
    """A parametrization of somebody's own, with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * weight.sin()


def normed(v: Tensor, g: Tensor) -> Tensor:
    return g * v / v.norm(dim=1, keepdim=True)


def spectral(weight: Tensor, kept: Kept, name: str) -> Tensor:
    """One power iteration, as torch's old spectral_norm takes it, and the weight over its norm."""
    u, v = kept[f"{name}_u"], kept[f"{name}_v"]
    with torch.no_grad():
        v = F.normalize(weight.T @ u, dim=0)
        u = F.normalize(weight @ v, dim=0)
    kept[f"{name}_u"], kept[f"{name}_v"] = u, v
    return weight / (u @ weight @ v)


def spectral_new(weight: Tensor, kept: Kept, name: str) -> Tensor:
    """Likewise torch's new one, which begins with the other vector."""
    u, v = kept[f"{name}_u"], kept[f"{name}_v"]
    with torch.no_grad():
        u = F.normalize(weight @ v, dim=0)
        v = F.normalize(weight.T @ u, dim=0)
    kept[f"{name}_u"], kept[f"{name}_v"] = u, v
    return weight / (u @ weight @ v)


# -- who calls what --------------------------------------------------------------------------------


class Choosing(Net):
    """Chooses its forward when it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.doubled

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class KeepsMethod(nn.Module):
    """Keeps a bound method of its own, one of a layer, a partial, and layers in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.hide = self.hidden
        self.last = self.head.forward

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hide(x))


class KeepsLayers(nn.Module):
    """Keeps its layers a second time, in containers that torch does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.first = [self.body]
        self.by_name = {"last": (self.head, "head")}
        self.last = functools.partial(F.linear, bias=None)
        self.call = functools.partial(self.by_name["last"][0])

    def forward(self, x: Tensor) -> Tensor:
        assert self.by_name["last"][0].weight is self.head.weight
        return self.call(torch.tanh(self.first[0](x)))


class KeepsFunction(Net):
    """Keeps a function that has one of its layers in its closure."""

    def __init__(self) -> None:
        super().__init__()
        self.last = lambda x: self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.body(x)))


class Caller:
    """An object that holds a layer, and is none."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


class KeepsCaller(Net):
    """Calls a layer by an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.last = Caller(self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.body(x)))


class CallsBoth(Net):
    """Calls a layer itself, and by an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.last = Caller(self.head)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden) + self.last(hidden)


class CountsCalls(Net):
    """Counts its calls in a plain attribute, and goes by it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (1 + self.calls / 10) * super().forward(x)


class Averaging(Net):
    """Keeps a mean of its inputs in a plain attribute, and goes by it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return super().forward(x - self.mean)


def counted_calls(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    kept[".calls"] = kept.get(".calls", torch.zeros(())) + 1
    return (1 + kept[".calls"] / 10) * written_out(w, x)


def averaged(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    kept[".mean"] = 0.5 * kept.get(".mean", torch.zeros(3)) + 0.5 * x.mean(0)
    return written_out(w, x - kept[".mean"])


class HidesLayer(Net):
    """Holds a layer as an attribute that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["last"] = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.body(x)))


def wrapped() -> nn.Module:
    net = Net()
    inner = net.forward
    net.forward = lambda x: 2 * inner(x)
    return net


# -- classes ---------------------------------------------------------------------------------------


class Abstract(nn.Module, abc.ABC):
    """As peft's layers and many a code base has it."""

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class Concrete(Abstract):
    """One that can be made."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Meta(type):
    """Somebody's metaclass."""


class OfMeta(Net, metaclass=Meta):
    """A model of that."""


class Delegating(nn.Module):
    """Hands on what it does not have to the model inside of it, as peft's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Slicing(nn.Module):
    """Takes its layers by slices, as a Llama does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.ReLU()])
        self.run = nn.Sequential(*self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = layer(x)
        return self.run[2:3](x)


def sliced(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    hidden = torch.tanh(x @ w["layers.0.weight"].T + w["layers.0.bias"])
    return hidden @ w["layers.2.weight"].T + w["layers.2.bias"]


class TwoNames(Net):
    """One layer under two names, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Counting()
        self.again = self.body

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.body(x), (0, -1))
        return self.head(torch.tanh(self.again(x)))


class Counting(nn.Linear):
    """Assigns its buffer anew in every call."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x) * self.calls.cos()


def counted(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    def body(x: Tensor) -> Tensor:
        kept["body.calls"] = kept["body.calls"] + 1
        return (x @ w["body.weight"].T + w["body.bias"]) * kept["body.calls"].cos()

    hidden = torch.tanh(body(body(x)[:, :3]))
    return hidden @ w["head.weight"].T + w["head.bias"]


class WithoutLayer(Net):
    """Has set one of its layers to None."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Linear(3, 4)
        self.shortcut = None


class Recurrent(nn.Module):
    """A recurrent layer whose weight is computed."""

    def __init__(self, dress: Callable[..., Any]) -> None:
        super().__init__()
        self.body, self.head = nn.RNN(3, 4, batch_first=True), nn.Linear(4, 2)
        dress(self.body, "weight_ih_l0")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(torch.stack([x, x.sin()], 1))[0][:, 1])


def dressed_rnn(dress: Callable[..., Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Recurrent(dress)

    return make


def recurrent(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    prefix = "body.parametrizations.weight_ih_l0.original"
    new = f"{prefix}0" in w
    g, v = (w[f"{prefix}{i}"] if new else w[f"body.weight_ih_l0_{'gv'[i]}"] for i in range(2))
    bias = w["body.bias_ih_l0"] + w["body.bias_hh_l0"]
    hidden = torch.tanh(x @ normed(v, g).T + bias)
    hidden = torch.tanh(x.sin() @ normed(v, g).T + hidden @ w["body.weight_hh_l0"].T + bias)
    return hidden @ w["head.weight"].T + w["head.bias"]


def weight_norm_old(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    return written_out(w, x, body=normed(w["body.weight_v"], w["body.weight_g"]))


def weight_norm_new(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    name = "body.parametrizations.weight.original"
    return written_out(w, x, body=normed(w[f"{name}1"], w[f"{name}0"]))


def spectral_norm_old(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    return written_out(w, x, body=spectral(w["body.weight_orig"], kept, "body.weight"))


def spectral_norm_new(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    name = "body.parametrizations.weight"
    return written_out(w, x, body=spectral_new(w[f"{name}.original"], kept, f"{name}.0."))


def pruned(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    return written_out(w, x, body=w["body.weight_orig"] * kept["body.weight_mask"])


def of_its_own(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    name = "body.parametrizations.weight"
    return written_out(w, x, body=w[f"{name}.0.scale"] * w[f"{name}.original"].sin())


def captured(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    return written_out(w, x) + w["head.bias"]


def tripled(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    return written_out(w, 3 * x)


def compiled_layer() -> nn.Module:
    net = Net()
    net.body.compile(backend="eager")
    return net


def compiled_in_place() -> nn.Module:
    net = Net()
    net.compile(backend="eager")
    return net


def scripted(net: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(net)


def scripted_layer() -> nn.Module:
    net = Net()
    net.body = scripted(net.body)
    return net


class Quantised(Net):
    """Has a body of whole numbers, which nobody can adapt."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
            body = nn.Sequential(self.body.float())
            self.body = torch.ao.quantization.quantize_dynamic(body)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.float()).to(x.dtype)))


def quantised(w: Weights, x: Tensor, kept: Kept) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # as the test has it
        body = Quantised().body
    return torch.tanh(body(x.float()).to(x.dtype)) @ w["head.weight"].T + w["head.bias"]


class KeepsWeakly(Net):
    """Finds a layer by a weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.last = weakref.ref(self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.last()(torch.tanh(self.body(x)))


def wrapped_by_partial() -> nn.Module:
    """As accelerate does it."""
    net = Net()
    net._old_forward = net.forward

    def forward(module: nn.Module, *args: Any) -> Tensor:
        return 2 * module._old_forward(*args)

    net.forward = functools.update_wrapper(functools.partial(forward, net), net._old_forward)
    return net


DRESSES = {
    "nothing": Dress(Net, plainly),
    "forward hook": Dress(with_hook(lambda n: n.register_forward_hook(twice)), doubled),
    "forward hook of a layer": Dress(
        with_hook(lambda n: n.head.register_forward_hook(twice)), doubled
    ),
    "forward pre-hook, by keywords": Dress(
        with_hook(lambda n: n.register_forward_pre_hook(pre_hook, with_kwargs=True)), tripled
    ),
    "forward pre-hook of a layer": Dress(
        with_hook(lambda n: n.body.register_forward_pre_hook(lambda module, args: (3 * args[0],))),
        tripled,
    ),
    "forward hook, by keywords, always called": Dress(
        with_hook(
            lambda n: n.head.register_forward_hook(twice, with_kwargs=True, always_call=True)
        ),
        doubled,
    ),
    "backward pre-hook": Dress(
        with_hook(
            lambda n: n.body.register_full_backward_pre_hook(
                lambda module, grads: tuple(g / 2 for g in grads)
            )
        ),
        hooked_before,
        BY_VMAP,
    ),
    "backward hook": Dress(
        with_hook(
            lambda n: n.head.register_full_backward_hook(
                lambda module, grads, _: tuple(g / 2 for g in grads)
            )
        ),
        hooked_backward,
        BY_VMAP,
    ),
    "hook that is its own method": Dress(Remembering, plainly),
    "hook that captures the model": Dress(hook_that_captures, captured),
    "weight_norm, old": Dress(dressed(lambda n: nn.utils.weight_norm(n.body)), weight_norm_old),
    "weight_norm, parametrized": Dress(
        dressed(lambda n: parametrizations.weight_norm(n.body)), weight_norm_new
    ),
    "spectral_norm, old": Dress(
        dressed(lambda n: nn.utils.spectral_norm(n.body)), spectral_norm_old, BY_VMAP
    ),
    "spectral_norm, parametrized": Dress(
        dressed(lambda n: parametrizations.spectral_norm(n.body)), spectral_norm_new, BY_VMAP
    ),
    "parametrization of one's own": Dress(
        dressed(lambda n: parametrize.register_parametrization(n.body, "weight", Symmetric())),
        of_its_own,
    ),
    "pruning": Dress(dressed(lambda n: prune.l1_unstructured(n.body, "weight", 4)), pruned),
    "weight_norm of an RNN, old": Dress(dressed_rnn(nn.utils.weight_norm), recurrent),
    "weight_norm of an RNN, parametrized": Dress(
        dressed_rnn(parametrizations.weight_norm), recurrent
    ),
    "net.compile()": Dress(compiled_in_place, plainly),
    "layer.compile()": Dress(compiled_layer, plainly),
    "torch.compile(net)": Dress(
        lambda: torch.compile(Net(), backend="eager"), under("_orig_mod."), COMPILED
    ),
    "forward wrapped on the instance": Dress(wrapped, doubled),
    "forward wrapped by a partial": Dress(wrapped_by_partial, doubled),
    "forward chosen on the instance": Dress(Choosing, doubled),
    "bound methods as attributes": Dress(KeepsMethod, plainly),
    "layers in a list, a dict, a tuple, a partial": Dress(KeepsLayers, plainly),
    "function that captures a layer": Dress(KeepsFunction, plainly),
    "object that holds a layer": Dress(
        KeepsCaller,
        plainly,
        (("higher", "are for mamlpp_ext.integrations.torchopt or task_batch_loss"),),
    ),
    "layer called by itself and by an object": Dress(
        CallsBoth,
        doubled,
        (("higher", "are for mamlpp_ext.integrations.torchopt or task_batch_loss"),),
    ),
    "calls counted in a plain attribute": Dress(CountsCalls, counted_calls, BY_VMAP),
    "mean kept in a plain attribute": Dress(Averaging, averaged, BY_VMAP),
    "layer that is not registered": Dress(HidesLayer, plainly, BY_HIGHER),
    "layer in two places": Dress(TwoNames, counted, BY_VMAP),
    "layer set to None": Dress(WithoutLayer, plainly, BY_HIGHER),
    "weak reference to a layer": Dress(KeepsWeakly, plainly),
    "slices of layers": Dress(Slicing, sliced),
    "class that is an ABC": Dress(Concrete, plainly, BY_HIGHER),
    "class of a metaclass": Dress(OfMeta, plainly, BY_HIGHER),
    "class that hands on attributes": Dress(Delegating, under("inner.")),
    "traced by torch.fx": Dress(lambda: torch.fx.symbolic_trace(Net()), plainly),
    "scripted": Dress(
        lambda: scripted(Net()),
        plainly,
        tuple((path, "adapt the model that it was made of") for path in PATHS),
    ),
    "scripted layer": Dress(
        scripted_layer,
        plainly,
        (*BY_HIGHER, ("torchopt", "use task_batch_loss, or the layer it was made of")),
    ),
    "DataParallel": Dress(
        lambda: nn.DataParallel(Net()),
        under("module."),
        tuple((path, "pass the model in it, its .module") for path in PATHS[2:]),
    ),
    "DistributedDataParallel": Dress(
        lambda: nn.parallel.DistributedDataParallel(Net()), under("module."), BY_HIGHER
    ),
    "lazy": Dress(
        lambda: nn.Sequential(nn.LazyLinear(4)),
        plainly,
        tuple((path, "run one batch through the model") for path in PATHS),
    ),
    "quantised": Dress(Quantised, quantised),
}
