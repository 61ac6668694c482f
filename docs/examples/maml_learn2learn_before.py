"""Few-shot handwriting by clone() and adapt(): ``_before`` is MAML, ``_after`` MAML++."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from clone_and_adapt import MAML  # from learn2learn.algorithms import MAML
from few_shot import conv_net
from guide import STEPS, TASKS, WAYS, evaluate, tasks


def main(epochs: int = 10, iterations: int = 20, tests: int = 25, seed: int = 0) -> float:
    """Returns the accuracy on unseen classes after ``epochs`` times ``iterations``."""
    torch.manual_seed(seed)
    train_tasks, test_batches = tasks(seed, tests)
    net = conv_net(1, WAYS, filters=32, size=8)
    maml = MAML(net, lr=0.1)
    meta_opt = torch.optim.Adam(maml.parameters(), lr=1e-3)

    def adapt_to_each(batch, first_order):
        losses, all_logits = [], []
        for x_support, y_support, x_target, y_target in zip(*batch, strict=True):
            learner = maml.clone(first_order=first_order)
            for _ in range(STEPS):
                learner.adapt(F.cross_entropy(learner(x_support), y_support))
            losses.append(F.cross_entropy(logits := learner(x_target), y_target))
            all_logits.append(logits.detach())
        return torch.stack(losses).view(TASKS, -1), torch.stack(all_logits)

    def predict(batch):
        return adapt_to_each(batch, first_order=True)[1]

    for epoch in range(epochs):
        for _ in range(iterations):
            meta_opt.zero_grad()
            batch = train_tasks.sample()
            adapt_to_each(batch, first_order=False)[0].mean().backward()
            meta_opt.step()
        accuracy = evaluate(epoch, predict, test_batches)
    return accuracy


if __name__ == "__main__":
    main()
