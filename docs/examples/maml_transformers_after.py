"""Few-shot sentences with a BERT of transformers: ``_before`` is MAML, ``_after`` MAML++."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import mamlpp_ext as mpp
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
    net = mpp.convert_norm(make(), STEPS)
    lslr = mpp.LSLR(net, STEPS, lr=0.1)
    meta_opt = torch.optim.Adam([*net.parameters(), *lslr.parameters()], lr=3e-3)
    msl, da = mpp.MultiStepLoss(STEPS, anneal_epochs=3), mpp.DerivativeOrderAnnealing(1)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(meta_opt, epochs, eta_min=1e-5)
    adapt = partial(mpp.task_batch_loss, net, lslr, num_steps=STEPS, aggregate=msl)

    def loss_of(output, labels):
        return F.cross_entropy(output.logits, labels)

    def adapt_to_all(batch):
        result = adapt(batch, loss_of, second_order=da.second_order)
        return result.loss, result.logits.logits

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
        msl.step(), da.step(), annealing.step()
    return accuracy


if __name__ == "__main__":
    main()
