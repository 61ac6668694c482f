"""
Statistics over inner steps
===========================

While a task is adapted to, the activations drift, and one row of running statistics for all inner
steps would fit none of them well. :func:`~mamlpp_ext.convert_batchnorm` gives each step its own. A
line is one channel: how far its running mean has moved from that of step 0, in standard deviations
of step 0, and by which factor its running standard deviation has changed.
"""

import matplotlib.pyplot as plt

from small_learner import EPOCHS, STEPS, make_learner, train_epoch, training_tasks

learner, tasks = make_learner(), training_tasks()
for _ in range(EPOCHS):
    train_epoch(learner, tasks)

layers = ("norm1", "norm2", "norm3")
figure, grid = plt.subplots(2, 3, sharex=True, sharey="row", figsize=(5, 4.6), layout="constrained")
for name, above, below in zip(layers, *grid, strict=True):
    norm = learner.net.get_submodule(name)
    mean, deviation = norm.running_mean, norm.running_var.sqrt()  # [steps, channels]
    above.plot((mean - mean[0]) / deviation[0], color="tab:blue", alpha=0.5)
    below.plot(deviation / deviation[0], color="tab:orange", alpha=0.5)
    above.set_title(name)
    below.set_xticks(range(STEPS))
    for axes in (above, below):
        axes.grid(alpha=0.3)
grid[0, 0].set_ylabel("shift of the mean\n(deviations of step 0)")
grid[1, 0].set_ylabel("standard deviation\n(of step 0 = 1)")
grid[1, 1].set_xlabel("inner step")
plt.show()
