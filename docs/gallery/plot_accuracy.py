"""
Accuracy over time
==================

MAML and MAML++ from the same weights, on the same tasks, for 80 meta-iterations each; accuracy on
48 tasks of digits that training never saw. Dashed: each target predicted by itself, by the running
statistics, which MAML++ keeps for every inner step.

Both start from an inner rate of 0.02, which nobody tuned: MAML keeps it, MAML++ learns its rates.
One short run each, from one seed: the measured comparison is the table of the README.
"""

import time

import matplotlib.pyplot as plt
import torch

from small_learner import EPOCHS, PARTS, make_learner, train_epoch, training_tasks, unseen_tasks


def measured(learner):
    """The accuracies in percent, by batch and by running statistics."""
    sampler = unseen_tasks()
    return 100 * learner.accuracies(sampler.sample() for _ in range(6)).mean(1)


figure, axes = plt.subplots(figsize=(5, 4.2), layout="constrained")
for name, parts, colour in (("MAML", (), "tab:gray"), ("MAML++", PARTS, "tab:blue")):
    learner, tasks = make_learner(parts, inner_lr=0.02), training_tasks()
    seconds, trained, curve = [0.0], 0.0, [measured(learner)]
    for epoch in range(1, EPOCHS + 1):
        began = time.process_time()
        train_epoch(learner, tasks)
        trained += time.process_time() - began
        if epoch % 5 == 0:
            seconds.append(trained)
            curve.append(measured(learner))
    for column, (statistics, style) in enumerate({"batch": "-", "running": "--"}.items()):
        values = torch.stack(curve)[:, column]
        label = f"{name}, {statistics} statistics"
        axes.plot(seconds, values, style, marker="o", color=colour, label=label)
axes.set(xlabel="training (seconds of one core)", ylabel="accuracy on unseen digits (%)")
axes.axhline(100 / 10, color="black", linewidth=0.8, linestyle=":", label="guessing")
axes.grid(alpha=0.3)
axes.legend()
plt.show()
