"""The CPU cores and GPUs of this machine. Imports no torch."""

import math
import os
import subprocess
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container


def num_cores() -> int:
    """Return the number of CPU cores that this process may use, of those that it may run on."""
    cores = len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    return min(cores, quota(QUOTA) or cores)


def quota(file: Path) -> int | None:
    """Return the number of CPU cores that a control group may use, rounded up; None without a limit."""
    try:
        limit, period = file.read_text().split()
        return max(1, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError):  # another system, or `max` for no limit
        return None


def gpus() -> list[str]:
    """Return the CUDA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty without NVIDIA's driver."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip() not in ("", "-1")]
    try:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
