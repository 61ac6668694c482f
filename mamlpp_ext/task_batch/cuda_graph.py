"""A meta-loss and its gradients as a CUDA graph: a few launches in place of thousands.

A small network's iteration is thousands of kernels of some microseconds each, and launching them
one by one takes ten times as long as they run (measured; ``benchmarks/README.md``).

``torch.cuda.make_graphed_callables`` is not used because what it returns lies in the memory of the
graph: the next call would overwrite losses that are kept, and gradients that are accumulated.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mamlpp_ext.checks import listing
from mamlpp_ext.task_batch.chunks import with_gradients
from mamlpp_ext.task_batch.state import State, changed_names, contents
from mamlpp_ext.torch_private import forget_workspaces, held

Compute = Callable[[Any, Any], tuple[Sequence[Tensor], Any]]


class Captured:
    """A module's loss and gradients for tasks of one shape, captured.

    Args:
        compute: ``(module, tensors)`` to tensors, the loss first, and anything else.
        module: what it is called with, or rather with a copy of.
        batch: tasks, on a GPU.
        key: what is fixed in it, for whoever holds it to compare.

    Attributes:
        twin: the copy. It has to live as long: what else it holds is read by the graph.
        rebuild: what else ``compute`` returned.

    Raises:
        RuntimeError: if something in it waits for the GPU, or goes by what the time before left in
            plain attributes. Nothing has changed then.
    """

    def __init__(
        self, compute: Compute, module: nn.Module, batch: Sequence[Tensor], key: Any
    ) -> None:
        self.key = key
        self.twin = twin = _twin(module)
        self.inputs = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in batch)
        wanted = [t for t in (*twin.parameters(), *self.inputs) if t.requires_grad]

        def run() -> tuple[list[Tensor], list[Tensor | None]]:
            outputs, self.rebuild = compute(twin, self.inputs)
            grads: Any = [None] * len(wanted)
            if outputs[0].requires_grad:
                grads = torch.autograd.grad(outputs[0], wanted, allow_unused=True)
            return [output.detach() for output in outputs], [*grads]

        with torch.cuda.device(batch[0].device), _kept([*module.buffers()]):
            _check_leaves_nothing(run, twin, [t.get_device() for t in batch[:1] if t.is_cuda])
            self.replay, (self.outputs, self.grads) = recorded(run)

    def __call__(self, module: nn.Module, batch: Sequence[Tensor]) -> list[Tensor]:
        """Returns what the function returns; the loss has gradients, without further ones."""
        with torch.no_grad():
            for place, tensor in zip(self.inputs, batch, strict=True):
                place.copy_(tensor)
        self.replay()
        # Copies, as the next call overwrites what it returns.
        loss, *others = (output.clone() for output in self.outputs)
        grads = [None if grad is None else grad.clone() for grad in self.grads]
        learned = [t for t in (*module.parameters(), *batch) if t.requires_grad]
        return [with_gradients(loss, grads, learned), *others]

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the module that holds it captures for itself


def graph_key(module: nn.Module, batch: Sequence[Tensor]) -> tuple[Any, ...]:
    """Returns what a graph holds fixed: where any of it is another, so must be the graph."""
    layers = list(module.modules())
    return (
        [_description(t) for t in batch],
        [(t.data_ptr(), *_description(t)) for t in (*module.parameters(), *module.buffers())],
        [(id(layer), type(layer)) for layer in layers],
        [plain_attributes(layer) for layer in layers],  # train or eval, a dropout's p, ...
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
    )


def plain_attributes(thing: object) -> list[tuple[str, Any]]:
    """Returns the attributes of an object that are numbers, words, or tuples of such."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, tuple):
            return all(map(is_plain, value))
        return isinstance(value, (bool, int, float, str))

    return [(name, value) for name, value in vars(thing).items() if is_plain(value)]


def _description(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype, t.device, t.requires_grad


def check_on_one_gpu(module: nn.Module, batch: Sequence[Tensor]) -> None:
    """Says where model and batch are, if not on one GPU.

    Raises:
        ValueError: if they are elsewhere.
    """
    tensors = (*module.parameters(), *module.buffers(), *batch)
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1 or not batch[0].is_cuda:
        raise ValueError(
            f"cuda_graph=True needs model, rates and batch on one GPU, got {devices}; move them "
            "there, or leave cuda_graph out"
        )


def _check_leaves_nothing(run: Callable[[], Any], twin: nn.Module, devices: list[int]) -> None:
    """Raises if a run goes on with attributes: a replay is of the tensors, and assigns nothing."""
    start, found = State([*twin.modules()], every=True), []
    for _ in range(2):
        with torch.random.fork_rng(devices):  # what is drawn may be kept
            run()
        found.append(contents(twin))
    buffers = {name for name, _ in twin.named_buffers(remove_duplicate=False)}  # are written to
    left = [name for name in changed_names(*found) if name not in buffers]
    start.put_back()
    if left:
        raise RuntimeError(
            f"the forward goes on with what it leaves behind in {listing(left)}, which the replay "
            "of a CUDA graph leaves out; leave cuda_graph out"
        )


def recorded(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Returns what replays ``run``, and what it returned: the same tensors after every replay."""
    device = torch.cuda.current_device()
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # Weights that autocast has cast once would be those of the capture for ever.
    with torch.autocast("cuda", autocast[1], autocast[0], cache_enabled=False):
        with _on_a_side_stream(), torch.random.fork_rng([device]):
            run()  # torch's libraries set themselves up
            _run_without_waiting(run)
        graph = torch.cuda.CUDAGraph()
        forget_workspaces()
        # Of this thread alone: one that pins the memory of the next batch would end the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = run()
        forget_workspaces()
    return graph.replay, outputs


@contextmanager
def _on_a_side_stream() -> Iterator[None]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.current_stream().wait_stream(stream)


def _run_without_waiting(run: Callable[[], Any]) -> None:
    # Found before the capture: one that fails leaves torch's random numbers unusable (2.11). For
    # this time no thread of the process may wait for the GPU.
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise RuntimeError(
            f"the meta-loss cannot be captured as a CUDA graph: {error}. Nothing in the model, "
            "loss_fn or aggregate may wait for the GPU, as .item(), .tolist(), printing and "
            "tensors made from lists do; change that, or leave cuda_graph out"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _kept(tensors: list[Tensor]) -> Iterator[None]:
    """Puts tensors back as they were, however the block ends."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def _twin(module: nn.Module) -> nn.Module:
    """Returns a copy with parameters of its own over the same memory, and the same buffers.

    Gradients are taken by the copy's parameters: where those of the originals arrive is a matter of
    any graph of them that is still alive, which may be on a stream that cannot be captured. Other
    tensors and functions that a module holds are the copy's, too.
    """
    memo: dict[int, Any] = {}
    for layer in module.modules():
        others = [v for v in vars(layer).values() if isinstance(v, Tensor) or callable(v)]
        memo.update({id(value): value for value in (*held(layer, "buffers").values(), *others)})
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(p.detach(), p.requires_grad)
    return copy.deepcopy(module, memo)
