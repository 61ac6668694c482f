"""What the guides' changes bring: trains each ``_before`` and ``_after`` and records both.

``python docs/examples/measure_guides.py`` writes ``docs/guides/measured.json``, of which the tables
of the guides are made. Before and after take turns, on one core; the time is the processor's, so
that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from few_shot import Batch
from guide import evaluate

DOCS = Path(__file__).resolve().parents[1]
GUIDES = sorted(
    path.stem.removeprefix("maml_").removesuffix("_before")
    for path in Path(__file__).parent.glob("maml_*_before.py")
)


def measure(script: Any, epochs: int, iterations: int, tests: int, seed: int) -> dict[str, float]:
    """Returns the accuracy after the last epoch and the milliseconds of a training iteration."""
    aside = 0.0

    def last_only(epoch: int, predict: Any, batches: list[Batch]) -> float:
        nonlocal aside
        start = time.process_time()
        accuracy = evaluate(epoch, predict, batches) if epoch == epochs - 1 else math.nan
        aside += time.process_time() - start
        return accuracy

    script.evaluate = last_only
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        accuracy = script.main(epochs, iterations, tests, seed)
    seconds = time.process_time() - start - aside
    return {"accuracy": accuracy, "ms": 1000 * seconds / (epochs * iterations)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=GUIDES)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=10, help="training batches an epoch")
    parser.add_argument("--tests", type=int, default=25, help="test batches")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DOCS / "guides" / "measured.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = (args.epochs, args.iterations, args.tests)
    settings = dict(zip(("epochs", "iterations", "tests"), size, strict=True))
    record = {
        guide: {**settings, "torch": torch.__version__, "before": [], "after": []}
        for guide in args.guides
    }
    for seed in range(args.seeds):
        for guide, runs in record.items():
            for which in ("before", "after"):
                script = importlib.import_module(f"maml_{guide}_{which}")
                runs[which].append(measure(script, *size, seed))
                print(seed, guide, which, runs[which][-1], flush=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
