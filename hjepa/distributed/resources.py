"""What this machine has to share among processes: CPU cores and CUDA GPUs. Imports no torch."""

import os
import subprocess


def num_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def gpus() -> list[str]:
    """CUDA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none without NVIDIA's driver."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip() not in ("", "-1")]
    try:
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
