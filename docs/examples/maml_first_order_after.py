"""Few-shot handwriting in plain torch: ``_before`` is first-order MAML, ``_after`` MAML++."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

import mamlpp_ext as mpp
from few_shot import conv_net
from guide import STEPS, TASKS, WAYS, evaluate, tasks


def main(epochs: int = 10, iterations: int = 20, tests: int = 25, seed: int = 0) -> float:
    """Returns the accuracy on unseen classes after ``epochs`` times ``iterations``."""
    torch.manual_seed(seed)
    train_tasks, test_batches = tasks(seed, tests)
    net = mpp.convert_batchnorm(conv_net(1, WAYS, filters=32, size=8), STEPS)
    buffers = dict(net.named_buffers())
    lslr = mpp.LSLR(net, STEPS, lr=0.1)
    meta_opt = torch.optim.Adam([*net.parameters(), *lslr.parameters()], lr=1e-3)
    msl, da = mpp.MultiStepLoss(STEPS, anneal_epochs=3), mpp.DerivativeOrderAnnealing(1)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(meta_opt, epochs, eta_min=1e-5)

    def fnet(params, buffers, x):
        return mpp.functional_call(net, {**params, **buffers}, x)

    def adapt_to_each(batch, buffers, create_graph=False):
        losses, all_logits = [], []
        for x_support, y_support, x_target, y_target in zip(*batch, strict=True):
            params = lslr.parameters_of(net)
            for step in mpp.inner_steps(net, STEPS):
                loss = F.cross_entropy(fnet(params, buffers, x_support), y_support)
                grads = torch.autograd.grad(loss, params.values(), create_graph=create_graph)
                params = lslr.update(params, grads, step)
                losses.append(F.cross_entropy(logits := fnet(params, buffers, x_target), y_target))
            all_logits.append(logits.detach())
        return torch.stack(losses).view(TASKS, -1), torch.stack(all_logits)

    def predict(batch):
        return adapt_to_each(batch, copy.deepcopy(buffers))[1]

    for epoch in range(epochs):
        for _ in range(iterations):
            meta_opt.zero_grad()
            batch = train_tasks.sample()
            msl(adapt_to_each(batch, buffers, da.second_order)[0]).mean().backward()
            meta_opt.step()
        accuracy = evaluate(epoch, predict, test_batches)
        msl.step(), da.step(), annealing.step()
    return accuracy


if __name__ == "__main__":
    main()
