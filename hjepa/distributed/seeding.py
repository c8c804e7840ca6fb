"""Random numbers as a pure function of the seed of the run, a purpose and the number of the step.

The random numbers of a step (order, crops, masks, dropped paths) depend on nothing else. A resumed run, a job of a sweep and an
uninterrupted run therefore sample the same numbers, and no generator state has to be stored.
"""

from hashlib import blake2b

import torch
from torch import Generator


def derive(seed: int, *stream: int | str) -> int:
    """Return a 63-bit seed derived from the seed of the run and any names or counters, as in `derive(0, "masks", step)`."""
    digest = blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *stream: int | str) -> Generator:
    """Return a CPU generator seeded with `derive(seed, *stream)`."""
    return Generator().manual_seed(derive(seed, *stream))


def seed_global(seed: int, *stream: int | str) -> None:
    """Seed torch's global generators on all devices, which stochastic depth and dropout use."""
    torch.manual_seed(derive(seed, *stream))
