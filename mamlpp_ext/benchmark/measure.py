"""How the benchmarks measure: in alternation, and memory in processes of their own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

MEGABYTE = 10**6
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class Quartiles(NamedTuple):
    """A median between its quartiles."""

    median: float
    low: float
    high: float


class Memory(NamedTuple):
    """Memory of one process or device, in bytes.

    Attributes:
        before: the peak once model, rates and data are there, before the first forward.
        peak: the peak at the end.
    """

    before: int
    peak: int

    @property
    def increase(self) -> int:
        """What the iterations added."""
        return self.peak - self.before


def alternate(
    contenders: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Runs all contenders once to warm up, then in turn, round after round.

    What slows the machine down for a while so meets all of them alike, and the ratio of two
    contenders is taken within a round.

    Args:
        contenders: what to time, by name.
        rounds: how often.
        device: where they compute.

    Returns:
        The seconds that each took in each round.
    """
    keep_memory()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            gc.collect()  # or one contender pays for what another has left behind
            seconds[name].append(stopwatch(run, device))
    return seconds


def keep_memory() -> None:
    """Tells the allocator to keep what is freed, as ``docs/recipes.md`` advises.

    glibc gives the memory of an iteration back to the system, more or less of it as whatever ran
    before has taught it, and the next iteration waits for it anew: ours against the authors' took
    0.56 of the time in one process and 0.65 in another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_MAX, 0)


def stopwatch(run: Callable[[], object], device: str = "cpu") -> float:
    """Returns the seconds that ``run()`` takes, on a GPU until its last kernel has ended."""
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ratio(over: Sequence[float], under: Sequence[float]) -> Quartiles:
    """Returns the ratios of the rounds, summed up by their median and quartiles."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    if len(ratios) == 1:
        return Quartiles(ratios[0], ratios[0], ratios[0])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Quartiles(median, low, high)


def peak_bytes(device: str = "cpu") -> int:
    """Returns the highest memory so far: of the tensors on a GPU, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    # On Linux ru_maxrss is not the process's own: it starts from what the parent had when it
    # started this one (774 MB in a child of 11 MB).
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # absent on Windows

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def in_this_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns ``function(*arguments)``, for which the peak of a GPU's memory begins anew."""
    gc.collect()
    torch.cuda.empty_cache()
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    return function(*arguments)


def in_fresh_process(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """Returns ``function(*arguments)``, called in a new Python process.

    Args:
        function: importable by name, as pickle wants it.
        *arguments: what it is called with.
        seconds: how long it may take.

    Raises:
        TimeoutError: if it takes longer.
        RuntimeError: if it raises (its traceback is on stderr), or the process dies, for example
            for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise TimeoutError(f"not done within {seconds:g} seconds; allow more, or ask for less")
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a process that measures memory ended with exit code {process.exitcode} before it "
            "reported (-9: killed, mostly for want of memory); ask for fewer tasks or steps"
        ) from None
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))
