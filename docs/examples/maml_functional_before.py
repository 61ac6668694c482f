"""Few-shot handwriting with torchopt's functions: ``_before`` is MAML, ``_after`` MAML++."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import torchopt
from torch.func import functional_call

from few_shot import conv_net
from guide import STEPS, TASKS, WAYS, evaluate, tasks


def main(epochs: int = 10, iterations: int = 20, tests: int = 25, seed: int = 0) -> float:
    """Returns the accuracy on unseen classes after ``epochs`` times ``iterations``."""
    torch.manual_seed(seed)
    train_tasks, test_batches = tasks(seed, tests)
    net = conv_net(1, WAYS, filters=32, size=8)
    buffers = dict(net.named_buffers())
    params, inner_opt = dict(net.named_parameters()), torchopt.sgd(lr=0.1)
    meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)

    def fnet(params, buffers, x):
        return functional_call(net, (params, buffers), x)

    def adapt_to_each(batch, buffers, create_graph):
        losses, all_logits = [], []
        for x_support, y_support, x_target, y_target in zip(*batch, strict=True):
            fast, state = params, inner_opt.init(params)
            for _ in range(STEPS):
                loss = F.cross_entropy(fnet(fast, buffers, x_support), y_support)
                grads = torch.autograd.grad(loss, fast.values(), create_graph=create_graph)
                named = dict(zip(fast, grads, strict=True))
                updates, state = inner_opt.update(named, state, inplace=False)
                fast = torchopt.apply_updates(fast, updates, inplace=False)
            losses.append(F.cross_entropy(logits := fnet(fast, buffers, x_target), y_target))
            all_logits.append(logits.detach())
        return torch.stack(losses).view(TASKS, -1), torch.stack(all_logits)

    def predict(batch):
        return adapt_to_each(batch, copy.deepcopy(buffers), create_graph=False)[1]

    for epoch in range(epochs):
        for _ in range(iterations):
            meta_opt.zero_grad()
            batch = train_tasks.sample()
            adapt_to_each(batch, buffers, create_graph=True)[0].mean().backward()
            meta_opt.step()
        accuracy = evaluate(epoch, predict, test_batches)
    return accuracy


if __name__ == "__main__":
    main()
