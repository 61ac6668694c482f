"""Few-shot handwriting by clone() and adapt(): ``_before`` is MAML, ``_after`` MAML++."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import mamlpp_ext as mpp
from clone_and_adapt import MAML, update_module  # the latter from learn2learn
from few_shot import conv_net
from guide import STEPS, TASKS, WAYS, evaluate, tasks


def main(epochs: int = 10, iterations: int = 20, tests: int = 25, seed: int = 0) -> float:
    """Returns the accuracy on unseen classes after ``epochs`` times ``iterations``."""
    torch.manual_seed(seed)
    train_tasks, test_batches = tasks(seed, tests)
    net = mpp.convert_batchnorm(conv_net(1, WAYS, filters=32, size=8), STEPS)
    maml, lslr = MAML(net, lr=0.1), mpp.LSLR(net, STEPS, lr=0.1)
    meta_opt = torch.optim.Adam([*maml.parameters(), *lslr.parameters()], lr=1e-3)
    msl, da = mpp.MultiStepLoss(STEPS, anneal_epochs=3), mpp.DerivativeOrderAnnealing(1)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(meta_opt, epochs, eta_min=1e-5)

    def adapt(learner, loss, step):
        fast, rates = dict(learner.module.named_parameters()), lslr.rates_at(step)
        grads = torch.autograd.grad(loss, [fast[n] for n in rates], create_graph=da.second_order)
        for name, grad in zip(rates, grads, strict=True):
            fast[name].update = -rates[name] * grad
        update_module(learner.module)

    def adapt_to_each(batch, first_order):
        losses, all_logits = [], []
        for x_support, y_support, x_target, y_target in zip(*batch, strict=True):
            learner = maml.clone(first_order=first_order)
            for step in mpp.inner_steps(learner, STEPS):
                adapt(learner, F.cross_entropy(learner(x_support), y_support), step)
                losses.append(F.cross_entropy(logits := learner(x_target), y_target))
            all_logits.append(logits.detach())
        return torch.stack(losses).view(TASKS, -1), torch.stack(all_logits)

    @mpp.frozen_statistics(net)
    def predict(batch):
        return adapt_to_each(batch, first_order=True)[1]

    for epoch in range(epochs):
        for _ in range(iterations):
            meta_opt.zero_grad()
            batch = train_tasks.sample()
            msl(adapt_to_each(batch, not da.second_order)[0]).mean().backward()
            meta_opt.step()
        accuracy = evaluate(epoch, predict, test_batches)
        msl.step(), da.step(), annealing.step()
    return accuracy


if __name__ == "__main__":
    main()
