"""
Learned rates by layer and step
===============================

:class:`~mamlpp_ext.LSLR` keeps a rate for every adapted tensor and inner step. All start at 0.1
(white); training makes some larger (red) and some smaller (blue), even negative where an inner step
against the gradient helps.

A bias in front of a batch norm has no effect on the output, so hardly any gradient reaches its
rates.
"""

import matplotlib.pyplot as plt

from small_learner import EPOCHS, STEPS, make_learner, train_epoch, training_tasks

learner, tasks = make_learner(inner_lr=0.1), training_tasks()
for _ in range(EPOCHS):
    train_epoch(learner, tasks)

rates = learner.lslr.rates.detach()  # [tensors, steps]
reach = (rates - 0.1).abs().max().item()
figure, axes = plt.subplots(figsize=(5, 4.2), layout="constrained")
image = axes.imshow(rates, cmap="RdBu_r", vmin=0.1 - reach, vmax=0.1 + reach, aspect="auto")
for row, values in enumerate(rates.tolist()):
    for column, rate in enumerate(values):
        colour = "white" if abs(rate - 0.1) > 0.7 * reach else "black"
        axes.text(column, row, f"{rate:.2f}", ha="center", va="center", color=colour)
axes.set_yticks(range(len(rates)), learner.lslr.names)
axes.set_xticks(range(STEPS))
axes.set_xlabel("inner step")
figure.colorbar(image, label="inner rate")
plt.show()
