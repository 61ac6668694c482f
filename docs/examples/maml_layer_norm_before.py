"""Few-shot handwriting with a ConvNeXt, in higher: ``_before`` is MAML, ``_after`` MAML++."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from higher import innerloop_ctx

from guide import STEPS, TASKS, WAYS, evaluate, tasks
from small_models import conv_next


def main(epochs: int = 10, iterations: int = 20, tests: int = 25, seed: int = 0) -> float:
    """Returns the accuracy on unseen classes after ``epochs`` times ``iterations``."""
    torch.manual_seed(seed)
    train_tasks, test_batches = tasks(seed, tests)
    net = conv_next(WAYS)
    inner_opt = torch.optim.SGD(net.parameters(), lr=0.1)
    meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)

    def adapt_to_each(batch, train):
        losses, all_logits = [], []
        for x_support, y_support, x_target, y_target in zip(*batch, strict=True):
            with innerloop_ctx(
                net, inner_opt, copy_initial_weights=False, track_higher_grads=train
            ) as (fnet, diffopt):
                for _ in range(STEPS):
                    diffopt.step(F.cross_entropy(fnet(x_support), y_support))
                losses.append(F.cross_entropy(logits := fnet(x_target), y_target))
                all_logits.append(logits.detach())
        return torch.stack(losses).view(TASKS, -1), torch.stack(all_logits)

    def predict(batch):
        return adapt_to_each(batch, train=False)[1]

    for epoch in range(epochs):
        for _ in range(iterations):
            meta_opt.zero_grad()
            losses, _ = adapt_to_each(train_tasks.sample(), train=True)
            losses.mean().backward()
            meta_opt.step()
        accuracy = evaluate(epoch, predict, test_batches)
    return accuracy


if __name__ == "__main__":
    main()
