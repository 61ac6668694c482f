"""MAML++ written out plainly: the ground truth that every backend is held against.

Nothing but torch here: explicit loops over tasks and steps, weights in a dict, batch norm from
its mean and variance, inner gradients by :func:`torch.autograd.grad`. Source: Antoniou, Edwards and
Storkey, *How to train your MAML*, ICLR 2019 (arXiv 1810.09502), sections 4 and 5.

Letters: T tasks, K inner steps, R rows (steps that were trained; K <= R except for
``extra_steps="last"``), S support and Q target samples, C channels, P adapted tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Norm = Callable[[Tensor, str], Tensor]  # (x [N, C, *], name of the layer) -> [N, C, *]
Masks = Mapping[tuple[int, int, str], Tensor]  # (task, step, "support" or "target") -> [N, D]


@dataclasses.dataclass
class Answer:
    """What one meta-batch leaves behind.

    Attributes:
        loss: Meta-loss, the mean over tasks, ``[]``.
        step_losses: Target loss after each inner update, ``[T, K]``.
        logits: Target logits after the last inner update, ``[T, Q, ways]``.
        gradients: Meta-gradient of each tensor by name, and of the table as ``"rates"``
            (``[P, R]``); None where there is none.
        statistics: Running statistics by name, ``[R, C]``, and their counters, ``[R]``.
    """

    loss: Tensor
    step_losses: Tensor
    logits: Tensor
    gradients: dict[str, Tensor | None]
    statistics: dict[str, Tensor]


def multi_step_weights(num_steps: int, epoch: int, anneal_epochs: int) -> list[float]:
    """Weight of each step's target loss at a 0-based epoch, K numbers that sum to 1 (MSL)."""
    k, e, end = num_steps, epoch, anneal_epochs
    if e >= end:
        return final_step_weights(k)
    others = max(1 / k - e / (k * end), 0.03 / k)
    final = min(1 / k + e * (k - 1) / (k * end), 1 - (k - 1) * 0.03 / k)
    return [others] * (k - 1) + [final]


def final_step_weights(num_steps: int) -> list[float]:
    """Plain MAML: only the loss after the last update counts."""
    return [0.0] * (num_steps - 1) + [1.0]


def batch_norm(
    x: Tensor,
    name: str,
    weights: Mapping[str, Tensor],
    statistics: dict[str, Tensor],
    row: int,
    training: bool,
    momentum: float | None,
    eps: float = 1e-5,
) -> Tensor:
    """Batch norm of ``x [N, C, *]`` with row ``row`` of everything (BNRS and BNWB).

    In training mode the batch normalises and that row of ``statistics`` is updated; in eval mode
    the row normalises. Without rows of statistics the batch normalises in either mode.
    """
    over = [d for d in range(x.dim()) if d != 1]
    column = [1, -1] + [1] * (x.dim() - 2)
    tracked = f"{name}.running_mean" in statistics
    if training or not tracked:
        count = x.numel() // x.shape[1]
        mean = x.mean(over)
        var = ((x - mean.view(column)) ** 2).mean(over)  # biased: it normalises
        if training and tracked:
            unbiased = var.detach() * count / (count - 1)
            seen = statistics[f"{name}.num_batches_tracked"]
            seen[row] += 1
            m = 1 / seen[row].item() if momentum is None else momentum
            for key, new in (("running_mean", mean.detach()), ("running_var", unbiased)):
                old = statistics[f"{name}.{key}"]
                old[row] = (1 - m) * old[row] + m * new
    else:
        mean = statistics[f"{name}.running_mean"][row].clone()
        var = statistics[f"{name}.running_var"][row].clone()
    x = (x - mean.view(column)) / torch.sqrt(var.view(column) + eps)
    if f"{name}.weight" in weights:
        w, b = weights[f"{name}.weight"][row], weights[f"{name}.bias"][row]
        x = x * w.view(column) + b.view(column)
    return x


def conv_net(w: Mapping[str, Tensor], x: Tensor, norm: Norm, mask: Tensor | float) -> Tensor:
    """Two conv-norm-relu-pool blocks and a linear head: ``[N, 1, *] -> [N, ways]``."""
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    pool = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}[x.dim()]
    x = conv(x, w["conv1.weight"], w["conv1.bias"], padding=1)
    x = pool(torch.relu(norm(x, "norm1")), 2)
    x = conv(x, w["conv2.weight"], w["conv2.bias"], padding=1)
    x = pool(torch.relu(norm(x, "norm2")), 2)
    return (x.flatten(1) * mask) @ w["head.weight"].T + w["head.bias"]


def shared_net(w: Mapping[str, Tensor], x: Tensor, norm: Norm, mask: Tensor | float) -> Tensor:
    """A stem, the same conv-norm block twice, and a head: ``[N, 1, H, W] -> [N, ways]``."""
    x = F.max_pool2d(F.conv2d(x, w["stem.weight"], w["stem.bias"], padding=1), 2)
    for _ in range(2):
        x = F.conv2d(x, w["conv.weight"], w["conv.bias"], padding=1)
        x = torch.relu(norm(x, "norm"))
    return (x.flatten(1) * mask) @ w["head.weight"].T + w["head.bias"]


def mlp(w: Mapping[str, Tensor], x: Tensor, norm: Norm, mask: Tensor | float) -> Tensor:
    """One hidden layer with a norm: ``[N, *] -> [N, ways]``."""
    x = x.flatten(1) @ w["hidden.weight"].T + w["hidden.bias"]
    x = torch.relu(norm(x, "norm"))
    return (x * mask) @ w["head.weight"].T + w["head.bias"]


def maml_plus_plus(
    net: Callable[[Mapping[str, Tensor], Tensor, Norm, Tensor | float], Tensor],
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    rates: Tensor,
    adapted: Sequence[str],
    tasks: tuple[Tensor, Tensor, Tensor, Tensor],
    loss_weights: Sequence[float],
    *,
    second_order: bool = True,
    training: bool = True,
    momentum: float | None = 0.1,
    masks: Masks | None = None,
) -> Answer:
    """The meta-loss of one meta-batch, its gradients, and the statistics afterwards.

        loss = 1/T sum_t sum_i loss_weights[i] target_loss_t(theta_{i+1})
        theta_{i+1}[n] = theta_i[n] - rates[n, i] d support_loss_t(theta_i) / d theta_i[n]

    for each adapted name n, every other tensor as it is. In first order the inner gradients are
    constants.

    Args:
        net: One of the nets above.
        weights: Initial value of every parameter by name; those that require grad get a
            meta-gradient.
        statistics: Running statistics and counters by name, left as they are (copies are updated).
        rates: Inner rates, ``[P, R]``; row p belongs to ``adapted[p]``.
        adapted: Names of the tensors that the inner loop changes, P of them.
        tasks: ``x_support [T, S, ...], y_support [T, S], x_target [T, Q, ...], y_target [T, Q]``.
        loss_weights: K numbers; their count is the number of inner steps.
        second_order: Whether the inner gradients are differentiated too.
        training: Whether batches normalise and statistics are updated.
        momentum: Of the running statistics; None is the cumulative average.
        masks: Dropout masks, already scaled; None is no dropout.
    """
    theta = {n: w.detach().clone().requires_grad_(w.requires_grad) for n, w in weights.items()}
    alpha = rates.detach().clone().requires_grad_()
    statistics = {n: s.clone() for n, s in statistics.items()}
    losses: list[list[Tensor]] = []
    logits: list[Tensor] = []

    for t, (x_support, y_support, x_target, y_target) in enumerate(zip(*tasks, strict=True)):
        w = dict(theta)  # every task starts from the same initial weights
        losses.append([])
        for i in range(len(loss_weights)):
            row = min(i, rates.shape[1] - 1)  # further steps than rows reuse the last one

            def forward(x: Tensor, part: str, w=w, row=row, t=t, i=i) -> Tensor:
                def norm(z: Tensor, name: str) -> Tensor:
                    return batch_norm(z, name, w, statistics, row, training, momentum)

                return net(w, x, norm, 1.0 if masks is None else masks[t, i, part])

            support_loss = F.cross_entropy(forward(x_support, "support"), y_support)
            inner = torch.autograd.grad(
                support_loss,
                [w[n] for n in adapted],
                create_graph=second_order,
                allow_unused=True,
            )
            w = dict(w)
            for p, (n, g) in enumerate(zip(adapted, inner, strict=True)):
                if g is not None:
                    w[n] = w[n] - alpha[p, row] * g
            target_logits = forward(x_target, "target", w=w)  # after the update, still row i
            losses[t].append(F.cross_entropy(target_logits, y_target))
        logits.append(target_logits.detach())

    step_losses = torch.stack([torch.stack(row) for row in losses])  # [T, K]
    loss = (step_losses * torch.tensor(loss_weights, dtype=rates.dtype)).sum(1).mean()
    learned = {n: p for n, p in theta.items() if p.requires_grad} | {"rates": alpha}
    gradients = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    return Answer(
        loss=loss.detach(),
        step_losses=step_losses.detach(),
        logits=torch.stack(logits),
        gradients=dict(zip(learned, gradients, strict=True)),
        statistics=statistics,
    )
