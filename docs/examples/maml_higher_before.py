"""Few-shot handwriting with higher: ``_before`` is MAML as usually written, ``_after`` MAML++.

Twelve lines differ. Both are measured with batch statistics, as is usual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from higher import innerloop_ctx
from torch import Tensor

from few_shot import Batch, TaskSampler, conv_net, load, mean_and_interval, task_accuracies

WAYS, SHOTS, TARGETS, TASKS, STEPS, EPOCHS = 5, 1, 5, 4, 5, 10


def main(iterations: int = 20, test_batches: int = 25, path: str | None = None) -> float:
    """Trains for ``EPOCHS`` times ``iterations``; returns the accuracy on unseen classes."""
    torch.manual_seed(0)
    data = load(path)
    train_tasks = TaskSampler(data.train, WAYS, SHOTS, TARGETS, TASKS, seed=0)
    net = conv_net(1, WAYS, filters=32, size=data.train.shape[-1])
    inner_opt = torch.optim.SGD(net.parameters(), lr=0.1)
    meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)

    def adapt_to_each(batch: Batch, train: bool) -> tuple[Tensor, Tensor]:
        losses, all_logits = [], []
        for x_support, y_support, x_target, y_target in zip(*batch, strict=True):
            with innerloop_ctx(
                net, inner_opt, copy_initial_weights=False, track_higher_grads=train
            ) as (fnet, diffopt):
                for _ in range(STEPS):
                    diffopt.step(F.cross_entropy(fnet(x_support), y_support))
                losses.append(F.cross_entropy(logits := fnet(x_target), y_target))
                all_logits.append(logits.detach())
        return torch.stack(losses), torch.stack(all_logits)

    for epoch in range(EPOCHS):
        for _ in range(iterations):
            meta_opt.zero_grad()
            losses, _ = adapt_to_each(train_tasks.sample(), train=True)
            losses.mean().backward()
            meta_opt.step()
        test_tasks = TaskSampler(data.test, WAYS, SHOTS, TARGETS, TASKS, seed=1)
        batches = [test_tasks.sample() for _ in range(test_batches)]
        right = [task_accuracies(adapt_to_each(b, train=False)[1], b[3]) for b in batches]
        accuracy, interval = mean_and_interval(torch.cat(right))
        print(f"epoch {epoch}: accuracy {100 * accuracy:.1f} ± {100 * interval:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
