"""Few-shot handwriting with a hand-written net: ``_before`` is MAML, ``_after`` MAML++."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from guide import STEPS, TASKS, WAYS, evaluate, tasks

BLOCKS, FILTERS = 3, 32


class Net(nn.Module):
    """Blocks of convolution, batch norm, ReLU and pooling, and a head, with given weights."""

    def __init__(self) -> None:
        super().__init__()
        for block in range(BLOCKS):
            self.add_module(f"conv{block}", nn.Conv2d(FILTERS if block else 1, FILTERS, 3))
            self.add_module(f"norm{block}", nn.BatchNorm2d(FILTERS))
        self.head = nn.Linear(FILTERS, WAYS)

    def forward(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        for block in range(BLOCKS):
            conv, norm = f"conv{block}", getattr(self, f"norm{block}")
            x = F.conv2d(x, weights[f"{conv}.weight"], weights[f"{conv}.bias"], padding=1)
            x = F.max_pool2d(F.relu(norm(x)), 2)
        return F.linear(x.flatten(1), weights["head.weight"], weights["head.bias"])


def main(epochs: int = 10, iterations: int = 20, tests: int = 25, seed: int = 0) -> float:
    """Returns the accuracy on unseen classes after ``epochs`` times ``iterations``."""
    torch.manual_seed(seed)
    train_tasks, test_batches = tasks(seed, tests)
    net = mpp.convert_batchnorm(Net(), STEPS)
    lslr = mpp.LSLR(net, STEPS, lr=0.1)
    meta_opt = torch.optim.Adam([*net.parameters(), *lslr.parameters()], lr=1e-3)
    msl, da = mpp.MultiStepLoss(STEPS, anneal_epochs=3), mpp.DerivativeOrderAnnealing(1)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(meta_opt, epochs, eta_min=1e-5)

    def adapt_to_each(batch):
        losses, all_logits = [], []
        for x_support, y_support, x_target, y_target in zip(*batch, strict=True):
            weights = lslr.parameters_of(net)
            for step in mpp.inner_steps(net, STEPS):
                loss = F.cross_entropy(net(x_support, weights), y_support)
                grads = torch.autograd.grad(loss, weights.values(), create_graph=da.second_order)
                weights = lslr.update(weights, grads, step)
                losses.append(F.cross_entropy(logits := net(x_target, weights), y_target))
            all_logits.append(logits.detach())
        return torch.stack(losses).view(TASKS, -1), torch.stack(all_logits)

    @mpp.frozen_statistics(net)
    def predict(batch):
        return adapt_to_each(batch)[1]

    for epoch in range(epochs):
        for _ in range(iterations):
            meta_opt.zero_grad()
            losses, _ = adapt_to_each(train_tasks.sample())
            msl(losses).mean().backward()
            meta_opt.step()
        accuracy = evaluate(epoch, predict, test_batches)
        msl.step(), da.step(), annealing.step()
    return accuracy


if __name__ == "__main__":
    main()
