"""Few-shot handwriting with torchopt: ``_before`` is MAML as usually written, ``_after`` MAML++.

Twelve lines differ. Both are measured with batch statistics, as is usual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor

from few_shot import Batch, TaskSampler, conv_net, load, mean_and_interval, task_accuracies

WAYS, SHOTS, TARGETS, TASKS, STEPS, EPOCHS = 5, 1, 5, 4, 5, 10


def main(iterations: int = 20, test_batches: int = 25, path: str | None = None) -> float:
    """Trains for ``EPOCHS`` times ``iterations``; returns the accuracy on unseen classes."""
    torch.manual_seed(0)
    data = load(path)
    train_tasks = TaskSampler(data.train, WAYS, SHOTS, TARGETS, TASKS, seed=0)
    net = conv_net(1, WAYS, filters=32, size=data.train.shape[-1])
    meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)

    def adapt_to_each(batch: Batch, train: bool) -> tuple[Tensor, Tensor]:
        inner_opt = torchopt.MetaSGD(net, lr=0.1)
        # Running statistics stay after training tasks and are taken back after test tasks.
        net_state = torchopt.extract_state_dict(
            net, by="reference", with_buffers=not train, detach_buffers=True
        )
        inner_state = torchopt.extract_state_dict(inner_opt, by="reference")
        losses, all_logits = [], []
        for x_support, y_support, x_target, y_target in zip(*batch, strict=True):
            for _ in range(STEPS):
                inner_opt.step(F.cross_entropy(net(x_support), y_support))
            losses.append(F.cross_entropy(logits := net(x_target), y_target))
            all_logits.append(logits.detach())
            torchopt.recover_state_dict(net, net_state)
            torchopt.recover_state_dict(inner_opt, inner_state)
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
