"""How many kernels a meta-iteration launches on a GPU, and for how long they run.

On a GPU a small network is paid by the launch: the host needs longer for one than the kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def launches(run: Callable[[], object]) -> dict[str, float]:
    """Returns what ``run()`` does on the GPU, once it is warm.

    Returns:
        ``launches``, calls that start kernels or a graph of such; ``kernels``, with copies and
        fills; and ``kernel_seconds``, for which they ran, added up.
    """
    for _ in range(2):
        run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
    events = seen.key_averages()
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    started = [event for event in events if event.key.startswith(("cudaLaunch", "cudaGraphLaunch"))]
    return {
        "launches": sum(event.count for event in started),
        "kernels": sum(event.count for event in on_gpu),
        "kernel_seconds": sum(event.self_device_time_total for event in on_gpu) / 1e6,
    }
