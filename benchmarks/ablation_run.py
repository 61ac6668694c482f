"""One row of the ablation with one seed: training that survives being killed."""

from __future__ import annotations

import copy
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import networks
from ablation_checkpoint import load, save
from ablation_protocol import ROWS, Protocol
from few_shot import Batch, FewShotData, TaskSampler, summary, task_accuracies
from image_store import Images
from learners import STATISTICS, Learner, Schedules
from mamlpp_ext import PerStepBatchNorm2d
from report import versions

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # then the records are all there is
    SummaryWriter = None

VAL_SEED, TEST_SEED = 1, 2  # every row and seed is measured on the same tasks


class AblationRun:
    """Trains one row, validates, and tests the model that validated best.

    Args:
        row: a key of ``ROWS``.
        seed: of the weights and the training tasks.
        protocol: everything else.
        data: where the tasks come from.
        folder: for ``checkpoint.pt`` and ``records.jsonl``; made if missing.
        device: where to train.

    Raises:
        ValueError: if ``folder`` has a checkpoint of another protocol.
    """

    def __init__(
        self,
        row: str,
        seed: int,
        protocol: Protocol,
        data: FewShotData,
        folder: Path,
        device: str = "cpu",
    ) -> None:
        self.row, self.seed, self.protocol, self.data = row, seed, protocol, data
        self.folder, self.device = folder, device
        # The ink tells data sets apart.
        self.who = {"row": row, "seed": seed, "ink": data.ink(), **asdict(protocol)}
        p = protocol
        torch.manual_seed(seed)
        self.learner = Learner(
            networks.make(p.network, data.channels, p.ways, p.filters, data.size).to(device),
            ROWS[row],
            p.backend,
            steps=p.steps,
            inner_lr=p.inner_lr,
            schedules=Schedules(
                p.epochs, p.multi_step_loss, p.first_order, p.meta_lr_of(row), p.final_meta_lr
            ),
            clamp=p.clamp,
        )
        self.sampler = TaskSampler(data.train, p.ways, p.shots, p.targets, p.tasks, seed, p.flip)
        self.position = {"epoch": 0, "iteration": 0, "total": 0, "seconds": 0.0, "loss": 0.0}
        self.best: list[dict[str, Any]] = []  # of as many models as the test needs, best first
        self.records: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.writer: Any = None
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            self._load()

    def run(self, checkpoint_seconds: float) -> None:
        """Goes on to the end, with a checkpoint after so many seconds and each validation."""
        saved = time.monotonic()
        at = self.position
        while at["epoch"] < self.protocol.epochs:
            if not self._epoch_is_over():
                self._iterate()
                if time.monotonic() - saved < checkpoint_seconds:
                    continue
            else:
                self._end_epoch()
                if at["epoch"] % self.protocol.val_every and at["epoch"] != self.protocol.epochs:
                    continue
                self._validate()
            self._save()
            saved = time.monotonic()
        if self.records[-1]["kind"] != "test":
            self._test()
            self._save()

    def _epoch_is_over(self) -> bool:
        at, p = self.position, self.protocol
        if p.minutes is None:
            return at["iteration"] >= p.iterations
        return at["seconds"] >= 60 * p.minutes * (at["epoch"] + 1) / p.epochs

    def _iterate(self) -> None:
        # Of a CPU the time that this process had of it: others may be busy there, too.
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        began = clock()
        at = self.position
        at["loss"] += self.learner.train_on(self._to_device(self.sampler.sample()))
        at["seconds"] += clock() - began
        at["iteration"] += 1
        at["total"] += 1

    def _end_epoch(self) -> None:
        at = self.position
        at["mean_loss"] = at["loss"] / max(at["iteration"], 1)
        at.update(epoch=at["epoch"] + 1, iteration=0, loss=0.0)
        if at["epoch"] < self.protocol.epochs:
            self.learner.end_epoch()

    def _validate(self) -> None:
        found = self._accuracy(*self._predictions(self.data.val, self.protocol.val_tasks, VAL_SEED))
        self._record("validation", **found)
        accuracy = found["batch_statistics"]["accuracy"]
        kept = max(1, self.protocol.ensemble)
        if len(self.best) < kept or accuracy > self.best[-1]["accuracy"]:
            state = copy.deepcopy(self.learner.state_dict())
            model = {"accuracy": accuracy, "epoch": self.position["epoch"]}
            self.best.append({**model, "net": state["net"], "lslr": state["lslr"]})
            self.best.sort(key=lambda model: -model["accuracy"])  # the earlier of two equal ones
            del self.best[kept:]
        print(
            f"{self.row:10} seed {self.seed}: epoch {self.position['epoch']:3}, iteration "
            f"{self.position['total']}, loss {self.position['mean_loss']:.3f}, validation "
            f"{100 * accuracy:.1f} %",
            file=sys.stderr,
            flush=True,
        )

    def _test(self) -> None:
        net, lslr = self.learner.net, self.learner.lslr
        together: Any = 0
        for model in reversed(self.best):  # the best one last: it stays
            net.load_state_dict(model["net"])
            lslr.load_state_dict(model["lslr"])
            logits, labels = self._predictions(self.data.test, self.protocol.test_tasks, TEST_SEED)
            # Logits are averaged, as in evaluated_test_set_using_the_best_models of the authors'
            # experiment_builder.py, and not what softmax makes of them.
            together = together + logits / len(self.best)
        found = self._accuracy(logits, labels)
        if self.protocol.ensemble:
            epochs = [model["epoch"] for model in self.best]
            found["ensemble"] = {"epochs": epochs, **self._accuracy(together, labels)}
        rates = lslr.rates.tolist() if lslr.rates.requires_grad else None
        self._record(
            "test",
            picked_epoch=self.best[0]["epoch"],
            **found,
            rates=rates and dict(zip(lslr.names, rates, strict=True)),
            norm_weights={
                name: layer.weight.tolist()
                for name, layer in net.named_modules()
                if isinstance(layer, PerStepBatchNorm2d) and layer.num_steps > 1
            },
        )

    def _predictions(
        self, images: torch.Tensor | Images, count: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        p = self.protocol
        sampler = TaskSampler(images, p.ways, p.shots, p.eval_targets, 1, seed)
        batches = (self._to_device(sampler.sample()) for _ in range(count))
        logits, labels = self.learner.predictions(batches)
        return logits.cpu(), labels.cpu()

    def _accuracy(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        found = zip(STATISTICS, logits, strict=True)
        return {name: summary(task_accuracies(by, labels)) for name, by in found}

    def _to_device(self, batch: Batch) -> Batch:
        x_support, y_support, x_target, y_target = (part.to(self.device) for part in batch)
        return x_support, y_support, x_target, y_target

    def _record(self, kind: str, **found: Any) -> None:
        at = self.position
        if SummaryWriter:  # a point made twice, after a kill, is the same
            self.writer = self.writer or SummaryWriter(self.folder / "tensorboard")
            for name in STATISTICS:
                accuracy = found[name]["accuracy"]
                self.writer.add_scalar(f"{kind}/{name}", accuracy, at["total"])
            self.writer.add_scalar("loss", at["mean_loss"], at["total"])
            self.writer.flush()
        self.records.append(
            {
                "row": self.row,
                "seed": self.seed,
                "kind": kind,
                "epoch": at["epoch"],
                "iterations": at["total"],
                "loss": at["mean_loss"],
                "meta_lr": self.learner.meta_lr,
                **found,
                "seconds": at["seconds"],
                "machine": self._machine(),
                "versions": versions(),
                "data": self.data.title,
                "settings": asdict(self.protocol),
            }
        )

    def _machine(self) -> str:
        is_gpu = torch.device(self.device).type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_gpu else self.device
        return f"{platform.machine()}, {os.cpu_count()} cores, {name}"

    def _save(self) -> None:
        state = {
            "learner": self.learner.state_dict(),
            "sampler": self.sampler.state_dict(),
            "torch_random": torch.get_rng_state(),
            "position": self.position,
            "best": self.best,
        }
        save(self.folder, self.who, state, self.records)

    def _load(self) -> None:
        state = load(self.checkpoint, self.who, self.device)
        self.learner.load_state_dict(state["learner"])
        self.sampler.load_state_dict(
            {"generator": state["sampler"]["generator"].cpu()}  # map_location moves it too
        )
        torch.set_rng_state(state["torch_random"].cpu())
        self.position, self.best = state["position"], state["best"]
        self.records = state["records"]
