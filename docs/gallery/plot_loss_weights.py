"""
Loss weights over epochs
========================

:class:`~mamlpp_ext.MultiStepLoss` weighs the target loss after each inner step: all alike at first,
the last one more and more, it alone from ``anneal_epochs`` on (dotted; here 10). Below are the
losses themselves, on eight tasks of unseen digits: how far each inner step gets as training goes
on, and what happens to the early ones once they no longer count.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import mamlpp_ext as mpp
from small_learner import EPOCHS, STEPS, make_learner, train_epoch, training_tasks, unseen_tasks

learner, tasks, unseen = make_learner(), training_tasks(), unseen_tasks().sample()
weights, losses = [], []
for _ in range(EPOCHS):
    weights.append(learner.msl.weights)
    train_epoch(learner, tasks)
    with torch.no_grad(), mpp.frozen_statistics(learner.net):
        result = mpp.task_batch_loss(
            learner.net, learner.lslr, unseen, F.cross_entropy, num_steps=STEPS
        )
    losses.append(result.step_losses.mean(0))

figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(5, 5.4), layout="constrained")
colours = plt.get_cmap("viridis")(torch.linspace(0, 0.9, STEPS).numpy())
for step, colour in enumerate(colours):
    above.step(range(EPOCHS), torch.stack(weights)[:, step], where="post", color=colour)
    below.plot(torch.stack(losses)[:, step], color=colour, label=f"after step {step}")
for axes in (above, below):
    axes.axvline(learner.msl.anneal_epochs, color="black", linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.3)
above.set_ylabel("weight of the target loss")
below.set(xlabel="epoch (of 4 iterations)", ylabel="target loss, unseen digits")
below.set_xticks(range(0, EPOCHS, 5))
below.legend()
plt.show()
