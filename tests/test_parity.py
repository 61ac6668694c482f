"""Every backend against MAML++ written out plainly (``equations.py``), in float64.

A case is a net with its equation, a backend is one way to run the inner loop; each pair is compared
in meta-loss, step losses, logits, every meta-gradient and every running statistic.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import equations
import mamlpp_ext as mpp
from equations import Answer, maml_plus_plus

higher = pytest.importorskip("higher")
torchopt = pytest.importorskip("torchopt")

from mamlpp_ext.integrations import higher as mpp_higher
from mamlpp_ext.integrations import torchopt as mpp_torchopt

TASKS, STEPS, WAYS, SUPPORT, TARGET = 2, 3, 4, 5, 6
EPOCH, ANNEAL_EPOCHS = 3, 8  # the middle of the annealing: no weight is at its floor
TOLERANCE = 1e-9
SEED = 5
KEEP = 0.75  # dropout keeps this share


# ---------------------------------------------------------------------------------------------
# The cases: the same nets as in equations.py, as a user would write them.


class ConvNet(nn.Module):
    """``equations.conv_net`` for 1, 2 or 3 spatial dimensions."""

    def __init__(self, dims: int = 2, dropout: float = 0.0, rows: int = STEPS, **norm: object):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        per_step = (mpp.PerStepBatchNorm1d, mpp.PerStepBatchNorm2d, mpp.PerStepBatchNorm3d)[
            dims - 1
        ]
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1]
        self.conv1, self.norm1 = conv(1, 3, 3, padding=1), per_step(3, rows, **norm)
        self.conv2, self.norm2 = conv(3, 2, 3, padding=1), per_step(2, rows, **norm)
        self.pool, self.dropout = pool(2), nn.Dropout(dropout)
        self.head = nn.Linear(2 * 2**dims, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm1(self.conv1(x))))
        x = self.pool(torch.relu(self.norm2(self.conv2(x))))
        return self.head(self.dropout(x.flatten(1)))


class SharedNet(nn.Module):
    """``equations.shared_net``: a conv and a norm that are used twice in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), mpp.PerStepBatchNorm2d(2, STEPS)
        self.head = nn.Linear(32, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        for _ in range(2):
            x = torch.relu(self.norm(self.conv(x)))
        return self.head(x.flatten(1))


class AliasNet(SharedNet):
    """The same, with the shared modules registered under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_again, self.norm_again = self.conv, self.norm

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.norm_again(self.conv_again(x)))
        return self.head(x.flatten(1))


class TiedNet(SharedNet):
    """The same, with two convolutions that share their parameters and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_again = nn.Conv2d(2, 2, 3, padding=1)
        self.conv_again.weight, self.conv_again.bias = self.conv.weight, self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.norm(self.conv_again(x)))
        return self.head(x.flatten(1))


class MLP(nn.Module):
    """``equations.mlp``: a norm of ``[N, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm = nn.Linear(64, 6), mpp.PerStepBatchNorm1d(6, STEPS)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.hidden(x.flatten(1)))))


def unused_net() -> nn.Module:
    net = ConvNet()
    net.spare = nn.Parameter(torch.ones(2))
    return net


def frozen_net() -> nn.Module:
    net = ConvNet()
    net.conv1.weight.requires_grad_(False)
    net.norm2.bias.requires_grad_(False)
    return net


@dataclasses.dataclass(frozen=True)
class Case:
    """A net, its equation, and what differs from the plain setting."""

    build: Callable[[], nn.Module]
    equation: Callable[..., Tensor] = equations.conv_net
    adapt: object = None  # as LSLR takes it
    adapted: Callable[[str], bool] = lambda name: "norm" not in name  # the same, said plainly
    momentum: float | None = 0.1
    steps: int = STEPS
    extra_steps: str = "error"
    training: bool = True
    shape: tuple[int, ...] = (1, 8, 8)
    masks: bool = False


def everything(name: str) -> bool:
    return True


CASES = {
    "conv": Case(ConvNet),
    "conv1d": Case(functools.partial(ConvNet, 1), shape=(1, 8)),
    "conv3d": Case(functools.partial(ConvNet, 3), shape=(1, 8, 8, 8)),
    "mlp": Case(MLP, equations.mlp, adapt=everything, adapted=everything),
    "adapted rows": Case(ConvNet, adapt=everything, adapted=everything),
    "adapted weights": Case(
        ConvNet, adapt=["*.weight"], adapted=lambda name: name.endswith("weight")
    ),
    "adapted head": Case(ConvNet, adapt=["head.*"], adapted=lambda name: name.startswith("head")),
    "shared": Case(SharedNet, equations.shared_net),
    "shared, two names": Case(AliasNet, equations.shared_net, adapt=everything, adapted=everything),
    "tied": Case(TiedNet, equations.shared_net),
    "unused": Case(unused_net),
    "frozen": Case(frozen_net),
    "dropout": Case(functools.partial(ConvNet, dropout=1 - KEEP), masks=True),
    "momentum=None": Case(functools.partial(ConvNet, momentum=None), momentum=None),
    "affine=False": Case(functools.partial(ConvNet, affine=False)),
    "no statistics": Case(functools.partial(ConvNet, track_running_stats=False)),
    "eval": Case(ConvNet, training=False),
    "more steps": Case(
        functools.partial(ConvNet, rows=STEPS - 1, extra_steps="last"), extra_steps="last"
    ),
}


def setup(case: Case) -> tuple[nn.Module, mpp.LSLR, tuple[Tensor, ...]]:
    """Net, rates and tasks of a case, the same every time; no two rows or rates are alike."""
    torch.manual_seed(SEED)
    net = case.build().double().train(case.training)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if "norm" in name and tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    rows = STEPS if case.extra_steps == "error" else STEPS - 1
    lslr = mpp.LSLR(net, rows, adapt=case.adapt, extra_steps=case.extra_steps).double()
    with torch.no_grad():
        lslr.rates.copy_(0.3 + 0.2 * torch.randn_like(lslr.rates))  # of either sign
    tasks = (
        torch.randn(TASKS, SUPPORT, *case.shape, dtype=torch.float64),
        torch.randint(WAYS, (TASKS, SUPPORT)),
        torch.randn(TASKS, TARGET, *case.shape, dtype=torch.float64),
        torch.randint(WAYS, (TASKS, TARGET)),
    )
    return net, lslr, tasks


def dropout_masks(case: Case, at_once: int) -> equations.Masks | None:
    """The masks that a seeded run draws: ``at_once`` tasks side by side, forward after forward."""
    if not case.masks:
        return None
    masks = {}
    torch.manual_seed(SEED)
    for first in range(0, TASKS, at_once):
        tasks = range(first, min(first + at_once, TASKS))
        for step in range(case.steps):
            for part, samples in (("support", SUPPORT), ("target", TARGET)):
                drawn = torch.empty(len(tasks), samples, 8, dtype=torch.float64).bernoulli_(KEEP)
                masks.update({(t, step, part): m / KEEP for t, m in zip(tasks, drawn, strict=True)})
    return masks


def loss_weights(case: Case, multi_step: bool) -> list[float]:
    if multi_step:
        return equations.multi_step_weights(case.steps, EPOCH, ANNEAL_EPOCHS)
    return equations.final_step_weights(case.steps)


@functools.cache
def truth(
    name: str, second_order: bool, multi_step: bool, at_once: int = 1, iterations: int = 1
) -> Answer:
    """The equations' answer to the last of some meta-iterations on the same tasks.

    ``at_once`` matters for the order of dropout masks alone.
    """
    case = CASES[name]
    net, lslr, tasks = setup(case)
    weights = dict(net.named_parameters())
    statistics = dict(net.named_buffers())
    for _ in range(iterations):
        found = maml_plus_plus(
            case.equation,
            weights,
            statistics,
            lslr.rates,
            [n for n, w in weights.items() if w.requires_grad and case.adapted(n)],
            tasks,
            loss_weights(case, multi_step),
            second_order=second_order,
            training=case.training,
            momentum=case.momentum,
            masks=dropout_masks(case, at_once),
        )
        statistics = found.statistics
    return found


# ---------------------------------------------------------------------------------------------
# The backends. Each takes (net, lslr, tasks, aggregate, steps, second_order), leaves the gradients
# in .grad and the statistics in the net, and returns meta-loss, step losses and logits.


def adapt_to(net, step, task, steps) -> tuple[list[Tensor], Tensor]:
    """The loop in a user's code; ``step`` is the inner optimizer's."""
    x_support, y_support, x_target, y_target = task
    step_losses = []
    for _ in mpp.inner_steps(net, steps):
        step(F.cross_entropy(net(x_support), y_support))
        logits = net(x_target)
        step_losses.append(F.cross_entropy(logits, y_target))
    return step_losses, logits.detach()


class InTurn:
    """Task after task, each with its own backward, as higher's and torchopt's examples do."""

    def __init__(self, aggregate: Callable[[list[Tensor]], Tensor]) -> None:
        self.aggregate, self.done = aggregate, []

    def add(self, step_losses: list[Tensor], logits: Tensor) -> None:
        loss = self.aggregate(step_losses)
        (loss / TASKS).backward()
        self.done.append((loss.detach(), torch.stack(step_losses).detach(), logits))

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        loss, step_losses, logits = (torch.stack(x) for x in zip(*self.done, strict=True))
        return loss.mean(), step_losses, logits


def by_higher(net, lslr, tasks, aggregate, steps, second_order):
    turns = InTurn(aggregate)
    for task in zip(*tasks, strict=True):
        with mpp_higher.innerloop_ctx(net, lslr, second_order=second_order) as (fnet, diffopt):
            turns.add(*adapt_to(fnet, diffopt.step, task, steps))
    return turns.result()


def by_higher_itself(net, lslr, tasks, aggregate, steps, second_order):
    turns = InTurn(aggregate)
    opt = mpp_higher.LSLROptimizer(net, lslr, second_order=second_order)
    for task in zip(*tasks, strict=True):
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fnet, diffopt):
            turns.add(*adapt_to(fnet, diffopt.step, task, steps))
    return turns.result()


def by_torchopt(net, lslr, tasks, aggregate, steps, second_order):
    turns = InTurn(aggregate)
    for task in zip(*tasks, strict=True):
        with mpp_torchopt.innerloop_ctx(net, lslr, second_order=second_order) as inner_opt:
            turns.add(*adapt_to(net, inner_opt.step, task, steps))
    return turns.result()


def by_extract_and_recover(net, inner_opt, tasks, aggregate, steps):
    turns = InTurn(aggregate)
    net_state = torchopt.extract_state_dict(net, by="reference", with_buffers=False)
    opt_state = torchopt.extract_state_dict(inner_opt, by="reference")
    for task in zip(*tasks, strict=True):
        turns.add(*adapt_to(net, inner_opt.step, task, steps))
        torchopt.recover_state_dict(net, net_state)
        torchopt.recover_state_dict(inner_opt, opt_state)
    return turns.result()


def by_meta_lslr(net, lslr, tasks, aggregate, steps, second_order):
    inner_opt = mpp_torchopt.MetaLSLR(net, lslr)
    inner_opt.second_order = second_order
    return by_extract_and_recover(net, inner_opt, tasks, aggregate, steps)


def by_chain(net, lslr, tasks, aggregate, steps, second_order):
    assert second_order  # torchopt.MetaOptimizer knows nothing else
    inner_opt = torchopt.MetaOptimizer(net, torchopt.chain(mpp_torchopt.lslr_transform(lslr)))
    return by_extract_and_recover(net, inner_opt, tasks, aggregate, steps)


def by_task_batch(net, lslr, tasks, aggregate, steps, second_order, **options):
    result = mpp.task_batch_loss(
        net,
        lslr,
        tasks,
        F.cross_entropy,
        num_steps=steps,
        aggregate=aggregate,
        second_order=second_order,
        **options,
    )
    result.loss.backward()
    return result.loss.detach(), result.step_losses.detach(), result.logits.detach()


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to run the inner loop, and what it cannot do."""

    run: Callable[..., tuple[Tensor, Tensor, Tensor]]
    at_once: int = 1  # tasks that draw their dropout masks side by side
    first_order: bool = True
    statistics: bool = True
    without: tuple[str, ...] = ()  # cases


BACKENDS = {
    "higher": Backend(by_higher),
    "higher itself": Backend(by_higher_itself, statistics=False),
    "torchopt context": Backend(by_torchopt),
    "torchopt MetaLSLR": Backend(by_meta_lslr),
    # torchopt.MetaOptimizer itself hard-codes create_graph=True, differentiates by frozen
    # parameters too (an error), and updates each place of a tied one by that place's gradient.
    "torchopt chain": Backend(by_chain, first_order=False, without=("frozen", "tied")),
    "task_batch": Backend(by_task_batch, at_once=TASKS),
    "task_batch rematerialized": Backend(
        functools.partial(by_task_batch, rematerialize=True), at_once=TASKS
    ),
    "task_batch in chunks": Backend(functools.partial(by_task_batch, chunk_size=2), at_once=2),
}


def aggregator(case: Case, multi_step: bool) -> mpp.MultiStepLoss | mpp.FinalStepLoss:
    if not multi_step:
        return mpp.FinalStepLoss()
    msl = mpp.MultiStepLoss(case.steps, ANNEAL_EPOCHS)
    for _ in range(EPOCH):
        msl.step()
    return msl


def answer(
    case: Case, backend: Backend, second_order: bool, multi_step: bool, iterations: int = 1
) -> Answer:
    """What a backend makes of a case, in the last of some meta-iterations on the same tasks."""
    net, lslr, tasks = setup(case)
    learned = {n: p for n, p in net.named_parameters() if p.requires_grad} | {"rates": lslr.rates}
    aggregate = aggregator(case, multi_step)
    for _ in range(iterations):
        for p in learned.values():
            p.grad = None
        torch.manual_seed(SEED)
        run = backend.run(net, lslr, tasks, aggregate, case.steps, second_order)
    gradients = {n: p.grad for n, p in learned.items()}
    left = dict(net.named_parameters())
    assert all(p is left[n] for n, p in learned.items() if n != "rates"), "parameters replaced"
    return Answer(*run, gradients=gradients, statistics=dict(net.named_buffers()))


def differences(got: Answer, want: Answer) -> dict[str, float]:
    """Largest absolute difference by name; no gradient counts as zero."""
    pairs = {
        "loss": (got.loss, want.loss),
        "step losses": (got.step_losses, want.step_losses),
        "logits": (got.logits, want.logits),
    }
    assert got.gradients.keys() == want.gradients.keys()
    for name, g in want.gradients.items():
        pairs[f"gradient of {name}"] = (got.gradients[name], g)
    assert got.statistics.keys() == want.statistics.keys()
    for name, s in want.statistics.items():
        pairs[f"statistic {name}"] = (got.statistics[name], s)
    zero = torch.zeros(())  # no gradient counts as one of zeros
    filled = {n: [zero if t is None else t for t in pair] for n, pair in pairs.items()}
    for name, (a, b) in filled.items():
        assert a is zero or b is zero or a.shape == b.shape, (name, a.shape, b.shape)
    return {n: float((a - b).abs().max()) for n, (a, b) in filled.items()}


def hold(got: Answer, want: Answer) -> None:
    off = {n: d for n, d in differences(got, want).items() if not d <= TOLERANCE}  # NaN is off
    assert not off, off


COMBINATIONS = [
    pytest.param(kind, name, second_order, multi_step, id=f"{kind}-{name}-{order}-{aggregate}")
    for kind, backend in BACKENDS.items()
    for name in CASES
    for order, second_order in (("second", True), ("first", False))
    for aggregate, multi_step in (("MSL", True), ("final", False))
    if (second_order or backend.first_order) and name not in backend.without
]


@pytest.mark.parametrize(("kind", "name", "second_order", "multi_step"), COMBINATIONS)
def test_backend_equals_the_equations(kind, name, second_order, multi_step):
    case, backend = CASES[name], BACKENDS[kind]
    want = truth(name, second_order, multi_step, backend.at_once)
    if not backend.statistics:  # then they must be untouched
        want = dataclasses.replace(want, statistics=dict(setup(case)[0].named_buffers()))
    hold(answer(case, backend, second_order, multi_step), want)


@pytest.mark.usefixtures("by_size")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", BACKENDS)
def test_tiny_tensors_left_to_torch_equal_the_equations(kind, name):
    backend = BACKENDS[kind]
    if name in backend.without:
        pytest.skip("not in this backend")
    want = truth(name, True, True, backend.at_once)
    if not backend.statistics:
        want = dataclasses.replace(want, statistics=dict(setup(CASES[name])[0].named_buffers()))
    hold(answer(CASES[name], backend, True, True), want)


@pytest.mark.parametrize("name", ["conv", "momentum=None"])
@pytest.mark.parametrize("kind", [kind for kind, backend in BACKENDS.items() if backend.statistics])
def test_a_second_meta_iteration_starts_where_the_first_ended(kind, name):
    backend = BACKENDS[kind]
    got = answer(CASES[name], backend, True, True, iterations=2)
    hold(got, truth(name, True, True, backend.at_once, iterations=2))


# ---------------------------------------------------------------------------------------------
# Test modes: the same losses, without a meta-gradient.


@pytest.mark.parametrize("name", ["conv", "adapted rows", "eval"])
def test_test_mode_of_higher_equals_the_equations(name):
    case, want = CASES[name], truth(name, True, True)
    net, lslr, tasks = setup(case)
    done = []
    for task in zip(*tasks, strict=True):
        with mpp_higher.innerloop_ctx(net, lslr, track_higher_grads=False) as (fnet, diffopt):
            step_losses, logits = adapt_to(fnet, diffopt.step, task, case.steps)
        done.append((torch.stack(step_losses).detach(), logits))
    for got, part in zip(zip(*done, strict=True), (want.step_losses, want.logits), strict=True):
        torch.testing.assert_close(torch.stack(got), part, rtol=0, atol=TOLERANCE)
    for n, b in setup(case)[0].named_buffers():  # nothing of a test task is written back
        assert torch.equal(net.get_buffer(n), b), n


@pytest.mark.parametrize("name", ["conv", "adapted rows", "eval"])
def test_task_batch_without_gradients_equals_the_equations(name):
    case, want = CASES[name], truth(name, True, True)
    net, lslr, tasks = setup(case)
    with torch.no_grad():
        got = mpp.task_batch_loss(net, lslr, tasks, F.cross_entropy, num_steps=case.steps)
    assert not got.loss.requires_grad
    for a, b in ((got.step_losses, want.step_losses), (got.logits, want.logits)):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------
# A batch of tasks.


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("name", ["conv", "adapted rows", "shared", "momentum=None", "eval"])
def test_tasks_in_turn_equal_a_batch_of_them(name, second_order):
    case = CASES[name]
    together = answer(case, BACKENDS["task_batch"], second_order, True)

    def one_by_one(net, lslr, tasks, aggregate, steps, second_order):
        done = []
        for t in range(TASKS):
            task = [part[t : t + 1] for part in tasks]
            result = mpp.task_batch_loss(
                net,
                lslr,
                task,
                F.cross_entropy,
                num_steps=steps,
                aggregate=aggregate,
                second_order=second_order,
            )
            (result.loss / TASKS).backward()
            done.append((result.loss.detach()[None], result.step_losses, result.logits))
        loss, step_losses, logits = (torch.cat(x) for x in zip(*done, strict=True))
        return loss.mean(), step_losses, logits

    hold(answer(case, Backend(one_by_one), second_order, True), together)


@pytest.mark.parametrize("options", [{}, {"rematerialize": True}, {"chunk_size": 2}])
def test_only_the_loss_of_a_task_batch_carries_a_graph(options):
    net, lslr, tasks = setup(CASES["conv"])
    got = mpp.task_batch_loss(net, lslr, tasks, F.cross_entropy, num_steps=STEPS, **options)
    assert got.loss.requires_grad
    assert not got.step_losses.requires_grad
    assert not got.logits.requires_grad
    assert not any(b.requires_grad for b in net.buffers())


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
def test_rematerialized_dropout_draws_the_same_masks(second_order):
    case = CASES["dropout"]
    stored = answer(case, BACKENDS["task_batch"], second_order, True)
    rebuilt = answer(case, BACKENDS["task_batch rematerialized"], second_order, True)
    hold(rebuilt, stored)


# ---------------------------------------------------------------------------------------------
# The layer by itself.


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(
    ("layer", "shape", "memory_format"),
    [
        (mpp.PerStepBatchNorm1d, (4, 2), torch.contiguous_format),
        (mpp.PerStepBatchNorm1d, (3, 2, 3), torch.contiguous_format),
        (mpp.PerStepBatchNorm2d, (3, 2, 2, 2), torch.contiguous_format),
        (mpp.PerStepBatchNorm2d, (3, 2, 2, 2), torch.channels_last),
        (mpp.PerStepBatchNorm3d, (2, 2, 2, 1, 2), torch.contiguous_format),
    ],
)
def test_per_step_batch_norm_derivatives(layer, shape, memory_format, affine, training, check):
    torch.manual_seed(SEED)
    norm = layer(2, 2, affine=affine).double().train(training)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    tables = {
        n: torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
        for n, _ in norm.named_parameters()
    }

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        with mpp.at_step(norm, 1):
            return torch.func.functional_call(norm, dict(zip(tables, values, strict=True)), (x,))

    assert check(forward, (x, *tables.values()))


# ---------------------------------------------------------------------------------------------
# The equations by themselves: the ground truth has to be held against something too.


def shifted(name: str, direction: dict[str, Tensor], by: float, second_order: bool) -> Tensor:
    """Meta-loss of the equations with every meta-parameter moved ``by`` along ``direction``."""
    case = CASES[name]
    net, lslr, tasks = setup(case)
    weights = {n: (p + by * direction[n]).detach() for n, p in net.named_parameters()}
    for n, p in net.named_parameters():
        weights[n].requires_grad_(p.requires_grad)
    return maml_plus_plus(
        case.equation,
        weights,
        dict(net.named_buffers()),
        lslr.rates + by * direction["rates"],
        [n for n in weights if case.adapted(n)],
        tasks,
        loss_weights(case, True),
        training=case.training,
        momentum=case.momentum,
        second_order=second_order,
    ).loss


@pytest.mark.parametrize("name", ["conv", "mlp", "adapted rows", "shared", "eval", "more steps"])
def test_second_order_equations_equal_finite_differences(name):
    want = truth(name, True, True)
    direction = {n: torch.randn_like(g) for n, g in want.gradients.items() if g is not None}
    slope = sum(float((g * direction[n]).sum()) for n, g in want.gradients.items())
    by = 1e-6
    measured = (shifted(name, direction, by, True) - shifted(name, direction, -by, True)) / (2 * by)
    assert float(measured) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", ["conv", "mlp", "adapted rows", "eval"])
def test_first_order_equations_equal_the_adjoint_recursion(name):
    r"""Without a graph through the inner loop: dL/dalpha_k = -<lambda_{k+1}, g_k>.

    With constant inner gradients every iterate moves as the initial weights do, so the
    meta-gradient of these is the sum of the target gradients; lambda_{k+1} is its part from step k.
    """
    case = CASES[name]
    net, lslr, tasks = setup(case)
    initial = dict(net.named_parameters())
    adapted = [n for n in initial if case.adapted(n)]
    want = truth(name, False, True)
    gradients = {n: torch.zeros_like(p) for n, p in initial.items()}
    gradients["rates"] = torch.zeros_like(lslr.rates)

    def slopes(w: dict[str, Tensor], x: Tensor, y: Tensor, row: int) -> dict[str, Tensor]:
        w = {n: p.detach().requires_grad_() for n, p in w.items()}
        statistics = {n: b.clone() for n, b in net.named_buffers()}

        def norm(z: Tensor, layer: str) -> Tensor:
            return equations.batch_norm(z, layer, w, statistics, row, case.training, 0.1)

        loss = F.cross_entropy(case.equation(w, x, norm, 1.0), y)
        found = torch.autograd.grad(loss, list(w.values()))
        return dict(zip(w, found, strict=True))

    for x_support, y_support, x_target, y_target in zip(*tasks, strict=True):
        w, trail = dict(initial), []
        for k, v in enumerate(loss_weights(case, True)):
            g = slopes(w, x_support, y_support, k)
            w = {
                n: p - lslr.rates[adapted.index(n), k] * g[n] if n in adapted else p
                for n, p in w.items()
            }
            target = slopes(w, x_target, y_target, k)
            trail.append((g, {n: v * slope for n, slope in target.items()}))
        adjoint = {n: torch.zeros_like(p) for n, p in initial.items()}
        for k, (g, target) in reversed(list(enumerate(trail))):
            adjoint = {n: adjoint[n] + target[n] for n in initial}
            for p, n in enumerate(adapted):
                gradients["rates"][p, k] -= float((adjoint[n] * g[n]).sum()) / TASKS
        for n in initial:
            gradients[n] += adjoint[n] / TASKS
    hold(dataclasses.replace(want, gradients=gradients), want)


@pytest.mark.parametrize("name", CASES)
def test_the_cases_can_tell_settings_apart(name):
    """Else a backend that ignores order, aggregator or a row of rates would pass unseen."""
    want = truth(name, True, True)
    for other in (truth(name, False, True), truth(name, True, False)):
        off = differences(other, want)
        assert max(off.values()) > 1e-3
        assert off["gradient of rates"] > 1e-4
    assert (want.gradients["rates"].abs().amax(0) > 1e-4).all()


def test_statistics_of_the_equations_equal_batch_norm_in_torch():
    """Row by row the layer is ``nn.BatchNorm2d``: its output and its running statistics."""
    for momentum in (0.1, None):
        torch.manual_seed(SEED)
        layer = nn.BatchNorm2d(2, momentum=momentum).double()
        rows = {f"norm.{n}": torch.stack([b, b]) for n, b in layer.named_buffers()}
        weights = {f"norm.{n}": torch.stack([p, p]) for n, p in layer.named_parameters()}
        for training in (True, True, False):
            x = torch.randn(3, 2, 2, 2, dtype=torch.float64)
            got = equations.batch_norm(x, "norm", weights, rows, 1, training, momentum)
            torch.testing.assert_close(got, layer.train(training)(x), rtol=0, atol=1e-12)
        for n, b in layer.named_buffers():
            torch.testing.assert_close(rows[f"norm.{n}"][1], b, rtol=0, atol=1e-12)
            assert (rows[f"norm.{n}"][0] == (1 if n == "running_var" else 0)).all()


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_multi_step_weights_of_the_equations(num_steps):
    for epoch in range(12):
        got = mpp.multi_step_loss_weights(num_steps, epoch, 10)
        want = torch.tensor(equations.multi_step_weights(num_steps, epoch, 10), dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-15)
