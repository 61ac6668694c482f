"""What MAML++ would do to a model, and whether an inner loop of it can run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamlpp_ext.check_setup import check_setup
from mamlpp_ext.fast_kernels import twice_differentiable
from mamlpp_ext.lslr import LSLR, functional_call
from mamlpp_ext.norm import convert_batchnorm
from mamlpp_ext.steps import inner_steps, per_step_layers
from mamlpp_ext.torch_private import is_batch_norm

_OF_THE_LOOP = ("(MSL)", "(DA)", "(CA)")  # findings that say nothing of a model


class Trial(NamedTuple):
    """What an inner loop is tried on.

    Attributes:
        task: support inputs and labels, target inputs and labels of one task. Inputs are a tensor
            for ``model(x)``, a tuple for ``model(*x)`` or a dict for ``model(**x)``.
        loss_fn: of an output and labels.
        noise: whether the inputs are noise of a ``--shape``, not the user's own.
    """

    task: tuple[Any, Any, Any, Any]
    loss_fn: Callable[[Any, Any], Tensor]
    noise: bool = False


def noise_of(shape: tuple[int, ...]) -> Trial:
    """Returns a trial on eight inputs of noise, for a model that returns a tensor."""
    x = torch.randn(8, *shape)
    return Trial((x, None, x, None), _size, noise=True)


def _size(output: Any, labels: None) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned a {type(output).__name__}, --shape needs one that returns a "
            "tensor; leave --shape out, name a wrapper that returns the logits alone, or give a "
            "batch of your own by --batch"
        )
    return output.square().mean()


def loss_of_logits(output: Any, labels: Any) -> Tensor:
    """Returns the cross entropy of an output, or of its ``logits``.

    Raises:
        TypeError: if there are none, or the labels are no tensor.
    """
    logits = output
    if not isinstance(output, Tensor):
        by_name = isinstance(output, dict)
        logits = output.get("logits") if by_name else getattr(output, "logits", None)
    if not (isinstance(logits, Tensor) and isinstance(labels, Tensor)):
        raise TypeError(
            f"the model returned a {type(output).__name__}, the labels are a "
            f"{type(labels).__name__}; without --loss both must be tensors (or the output have "
            "logits): name a function of the two by --loss package.module:function"
        )
    return F.cross_entropy(logits, labels)


def arguments_of(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns how a model is called with inputs: by position, and by name."""
    if isinstance(x, dict):
        return (), x
    return (x if isinstance(x, tuple) else (x,)), {}


def check_runs(model: nn.Module, trial: Trial) -> Any:
    """Calls a copy of the model once; returns what it returned.

    Raises:
        TypeError: if the loss takes no such output or labels.
        ValueError: if the model takes no such inputs, or the loss is no number.
    """
    x, labels, *_ = trial.task
    args, kwargs = arguments_of(x)
    try:
        with torch.no_grad():
            output = copy.deepcopy(model)(*args, **kwargs)
    except Exception as error:
        if trial.noise:
            raise ValueError(
                f"the model does not take noise [{', '.join(map(str, x.shape))}], as --shape has "
                f"it: {error}; give the shape of one input without the batch, or, to a model of "
                "token ids, of several or of named inputs, --batch package.module:function"
            ) from error
        raise ValueError(
            f"the model does not take the x_support of --batch: {error}; a tensor is called as "
            "model(x), a tuple as model(*x), a dict as model(**x)"
        ) from error
    if not trial.noise:
        _check_loss(trial, output, labels)
    return output


def _check_loss(trial: Trial, output: Any, labels: Any) -> None:
    try:
        loss = trial.loss_fn(output, labels)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the loss does not take the model's {type(output).__name__} and the labels: {error}; "
            "name a function of the two that returns a number by --loss package.module:function"
        ) from error
    if not isinstance(loss, Tensor) or loss.dim():
        what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"the loss must return a tensor of shape (), got {what}; take the mean over examples"
        )


def describe(
    model: nn.Module, steps: int, adapt: list[str] | None, trial: Trial | None
) -> Iterator[str]:
    """Yields the lines of the report: converted layers, rates, parameters, findings."""
    net = model
    if any(is_batch_norm(layer) for layer in model.modules()):
        net = convert_batchnorm(model, steps)
    for name, layer in per_step_layers(net).items():
        features = getattr(layer, "num_features", None)  # of a norm; others have them by name
        what = ", ".join(layer.per_step_names) if features is None else f"{features} features"
        yield f"per-step: '{name}', {what}, {layer.num_steps} rows"
    lslr = LSLR(net, steps, adapt=adapt)
    meta_opt = torch.optim.Adam([*net.parameters(), *lslr.parameters()])
    for name, p in net.named_parameters():
        learner = "adapted" if name in lslr.names else "outer loop alone"
        yield f"{learner if p.requires_grad else 'frozen'}: '{name}', {tuple(p.shape)}"
    yield f"rates: {lslr.rates.numel()}, {len(lslr.names)} tensors times {steps} steps"
    if trial is not None:
        check_runs(net, trial)
        yield from _about_an_inner_loop(net, lslr, trial)
    for finding in check_setup(net, lslr, meta_opt):
        if not any(part in finding for part in _OF_THE_LOOP):
            yield finding


def _about_an_inner_loop(net: nn.Module, lslr: LSLR, trial: Trial) -> list[str]:
    """Leaves the gradients of an inner loop; returns whether it cannot run in second order."""
    try:
        _run_inner_loop(net, lslr, trial, second_order=True)
    except RuntimeError as error:
        for p in (*net.parameters(), lslr.rates):
            p.grad = None
        _run_inner_loop(net, lslr, trial, second_order=False)  # or it cannot run at all
        return [f"problem: an inner loop runs in first order alone: {error}"]
    return []


def _run_inner_loop(net: nn.Module, lslr: LSLR, trial: Trial, *, second_order: bool) -> None:
    x, y, x_target, y_target = trial.task
    params: dict[str, Tensor] = dict(net.named_parameters())
    losses = []
    with twice_differentiable(net, second_order=second_order):
        for step in inner_steps(net, lslr.num_steps, second_order=second_order):
            wanted = {name: params[name] for name in lslr.names}
            support_loss = trial.loss_fn(functional_call(net, params, *arguments_of(x)), y)
            grads = torch.autograd.grad(
                support_loss, [*wanted.values()], create_graph=second_order, allow_unused=True
            )
            params = lslr.update(params, dict(zip(wanted, grads, strict=True)), step)
            output = functional_call(net, params, *arguments_of(x_target))
            losses.append(trial.loss_fn(output, y_target))
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
