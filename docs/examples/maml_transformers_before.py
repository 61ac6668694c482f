"""Few-shot sentences with a BERT of transformers: ``_before`` is MAML, ``_after`` MAML++."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from guide import evaluate
from sentences import STEPS, bert, tasks


def main(
    epochs: int = 10,
    iterations: int = 20,
    tests: int = 25,
    seed: int = 0,
    make: Callable[[], nn.Module] = bert,
) -> float:
    """Returns the accuracy on unseen tasks after ``epochs`` times ``iterations``."""
    torch.manual_seed(seed)
    train_tasks, test_batches = tasks(seed, tests)
    net = make()
    meta_opt = torch.optim.Adam(net.parameters(), lr=3e-3)

    def loss_of(output, labels):
        return F.cross_entropy(output.logits, labels)

    def adapt(params, x_spt, y_spt, x_qry, y_qry):
        for _ in range(STEPS):
            grads = grad(lambda p: loss_of(functional_call(net, p, (), x_spt), y_spt))(params)
            params = {name: p - 0.1 * grads[name] for name, p in params.items()}
        output = functional_call(net, params, (), x_qry)
        return loss_of(output, y_qry), output.logits

    @sdpa_kernel(SDPBackend.MATH)  # the other kernels have no second derivative
    def adapt_to_all(batch):
        params = {name: p for name, p in net.named_parameters() if p.requires_grad}
        return vmap(partial(adapt, params))(*batch)

    @torch.no_grad()
    def predict(batch):
        return adapt_to_all(batch)[1]

    for epoch in range(epochs):
        for _ in range(iterations):
            meta_opt.zero_grad()
            losses, _ = adapt_to_all(train_tasks.sample())
            losses.mean().backward()
            meta_opt.step()
        accuracy = evaluate(epoch, predict, test_batches)
    return accuracy


if __name__ == "__main__":
    main()
