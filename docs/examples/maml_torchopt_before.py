"""Few-shot handwriting with torchopt: ``_before`` is MAML, ``_after`` MAML++."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchopt

from few_shot import conv_net
from guide import STEPS, TASKS, WAYS, evaluate, tasks


def main(epochs: int = 10, iterations: int = 20, tests: int = 25, seed: int = 0) -> float:
    """Returns the accuracy on unseen classes after ``epochs`` times ``iterations``."""
    torch.manual_seed(seed)
    train_tasks, test_batches = tasks(seed, tests)
    net = conv_net(1, WAYS, filters=32, size=8)
    meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)

    def adapt_to_each(batch, train):
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
