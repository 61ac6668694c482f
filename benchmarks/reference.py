"""The authors' public code on the iteration that the comparison times.

It is read from a checkout of AntreasAntoniou/HowToTrainYourMAMLPytorch that the user names; none of
it is in this project. Its settings are those of its own
experiment_config/omniglot_maml++-omniglot_1_8_0.1_64_5_0.json.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mamlpp_ext as mpp
from mamlpp_ext.benchmark.measure import Memory, peak_bytes, stopwatch
from mamlpp_ext.benchmark.question import Question
from mamlpp_ext.task_batch.loss import Batch

QUESTION = Question("problems:conv4_leaky", (1, 28, 28))
ANNEAL_EPOCHS = 10
COMMIT = "86964701651c06e490271365fedb8789a72ef3f0"  # with which it was tried
THEIRS = "authors' code"
GOALS = 1 / 1.8, 0.5  # of their time and peak memory
# What task_batch_loss is given.
OURS: dict[str, dict[str, Any]] = {
    "task_batch_loss": {},
    "chunk_size=4": {"chunk_size": 4},
    "rematerialize=True": {"rematerialize": True},
    "both": {"chunk_size": 4, "rematerialize": True},
    "chunk_size=1": {"chunk_size": 1},
}
SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "cnn_blocks_per_stage": 1,
    "cnn_num_filters": 64,
    "conv_padding": True,
    "dataset_name": "omniglot_dataset",
    "enable_inner_loop_optimizable_bn_params": False,
    "first_order_to_second_order_epoch": -1,
    "learnable_bn_beta": True,
    "learnable_bn_gamma": True,
    "learnable_per_layer_per_step_inner_loop_learning_rate": True,
    "max_pooling": True,
    "meta_learning_rate": 0.001,
    "min_learning_rate": 0.00001,
    "multi_step_loss_num_epochs": ANNEAL_EPOCHS,
    "norm_layer": "batch_norm",
    "num_classes_per_set": 5,
    "num_stages": 4,
    "number_of_evaluation_steps_per_iter": 5,
    "number_of_training_steps_per_iter": 5,
    "per_step_bn_statistics": True,
    "second_order": True,
    "seed": 0,
    "task_learning_rate": 0.1,
    "total_epochs": 100,
    "use_multi_step_loss_optimization": True,
}


class Ours:
    """The same iteration here: multi-step loss at epoch 0, second order, Adam."""

    def __init__(self, model: nn.Module, batch: Batch, **settings: Any) -> None:
        self.batch, self.settings, steps = batch, settings, QUESTION.steps
        self.net = mpp.convert_batchnorm(model, steps)
        self.lslr = mpp.LSLR(self.net, steps, lr=0.1)
        self.msl = mpp.MultiStepLoss(steps, ANNEAL_EPOCHS)
        self.meta_opt = torch.optim.Adam([*self.net.parameters(), *self.lslr.parameters()], lr=1e-3)

    def __call__(self) -> float:
        self.meta_opt.zero_grad()
        result = mpp.task_batch_loss(
            self.net,
            self.lslr,
            self.batch,
            F.cross_entropy,
            num_steps=QUESTION.steps,
            aggregate=self.msl,
            **self.settings,
        )
        result.loss.backward()
        self.meta_opt.step()
        return result.loss.item()


class Reference:
    """The authors' ``MAMLFewShotClassifier``, with the weights of ``model``."""

    def __init__(self, checkout: Path, model: nn.Module, batch: Batch) -> None:
        if not (checkout / "few_shot_learning_system.py").exists():
            raise FileNotFoundError(
                f"{checkout} has no few_shot_learning_system.py; give a checkout of "
                "AntreasAntoniou/HowToTrainYourMAMLPytorch"
            )
        sys.path.insert(0, str(checkout))
        with _quiet():
            from few_shot_learning_system import MAMLFewShotClassifier

            settings = Namespace(**SETTINGS, use_cuda=device() == "cuda")
            shape = (2, *QUESTION.shape)
            self.system = MAMLFewShotClassifier(shape, torch.device(device()), settings)
            self._take_weights(model)
        # [T, ways, examples of a class, ...], as its data loader hands them over
        x_support, y_support, x_target, y_target = (
            part.unflatten(1, (-1, QUESTION.ways)).transpose(1, 2) for part in batch
        )
        order = (x_support, x_target, y_support, y_target)
        self.data = tuple(part.cpu().numpy() for part in order)

    def __call__(self) -> float:
        with _quiet():
            losses, _ = self.system.run_train_iter(self.data, epoch=0)
        return losses["loss"].item()

    @torch.no_grad()
    def _take_weights(self, model: nn.Module) -> None:
        theirs = dict(self.system.classifier.named_parameters())
        pairs: list[tuple[str, Tensor]] = []
        for number, conv in enumerate(m for m in model if isinstance(m, nn.Conv2d)):
            place = f"layer_dict.conv{number}.conv"
            pairs += [(f"{place}.weight", conv.weight), (f"{place}.bias", conv.bias)]
        pairs += [("layer_dict.linear.weights", model[-1].weight)]
        pairs += [("layer_dict.linear.bias", model[-1].bias)]
        for name, value in pairs:
            theirs[name].copy_(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It prints every parameter, and torch warns of what it was written before."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def device() -> str:
    """Returns where both compute: the authors' code takes a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def contender(name: str, checkout: Path, threads: int | None = None) -> Any:
    """Returns one of the iterations; all start from the same weights and see the same data."""
    model, batch = replace(QUESTION, threads=threads, device=device()).prepare()
    return Reference(checkout, model, batch) if name == THEIRS else Ours(model, batch, **OURS[name])


def memory_and_time(name: str, checkout: Path, threads: int | None = None) -> tuple[Memory, float]:
    """Runs two iterations of one of them; to be called in a fresh process."""
    iteration = contender(name, checkout, threads)
    before = peak_bytes(device())
    iteration()
    seconds = stopwatch(iteration, device())
    return Memory(before, peak_bytes(device())), seconds
