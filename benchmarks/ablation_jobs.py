"""Runs side by side, each in a process of its own, and all of them ended with this one."""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from image_store import remove_temporary


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Makes ``folder`` and keeps it from others that write there.

    Raises:
        ValueError: if another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, in any way
        except BlockingIOError:
            raise ValueError(
                f"another ablation is writing to {folder}; wait, or take another --out"
            ) from None
        yield


def run_all(
    work: Callable[..., str], jobs: Sequence[tuple[Any, ...]], flags: argparse.Namespace
) -> None:
    """Calls ``work`` with each of ``jobs``, ``flags.jobs`` at once, and says when one has ended."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(flags.jobs, spawn, end_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(work, *job) for job in jobs]):
                print(f"finished: {done.result()}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            remove_temporary(flags.data)
            os._exit(130)  # the processes end with this one; leaving the block would wait for them
        except Exception:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it has ended, killed or not.

    An executor's idle workers would otherwise wait for ever, and a busy one would go on writing to
    the folder in which a restart writes.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
