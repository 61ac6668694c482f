"""Few-shot handwriting with a ConvNeXt, in higher: ``_before`` is MAML, ``_after`` MAML++."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import mamlpp_ext as mpp
from guide import STEPS, TASKS, WAYS, evaluate, tasks
from mamlpp_ext.integrations.higher import innerloop_ctx
from small_models import conv_next


def main(epochs: int = 10, iterations: int = 20, tests: int = 25, seed: int = 0) -> float:
    """Returns the accuracy on unseen classes after ``epochs`` times ``iterations``."""
    torch.manual_seed(seed)
    train_tasks, test_batches = tasks(seed, tests)
    net = mpp.convert_norm(conv_next(WAYS), STEPS)
    lslr = mpp.LSLR(net, STEPS, lr=0.1)
    meta_opt = torch.optim.Adam([*net.parameters(), *lslr.parameters()], lr=1e-3)
    msl, da = mpp.MultiStepLoss(STEPS, anneal_epochs=3), mpp.DerivativeOrderAnnealing(1)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(meta_opt, epochs, eta_min=1e-5)

    def adapt_to_each(batch, train):
        losses, all_logits = [], []
        for x_support, y_support, x_target, y_target in zip(*batch, strict=True):
            with innerloop_ctx(
                net, lslr, second_order=da.second_order, track_higher_grads=train
            ) as (fnet, diffopt):
                for _ in mpp.inner_steps(fnet, STEPS):
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
            msl(losses).mean().backward()
            meta_opt.step()
        accuracy = evaluate(epoch, predict, test_batches)
        msl.step(), da.step(), annealing.step()
    return accuracy


if __name__ == "__main__":
    main()
