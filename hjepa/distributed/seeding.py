"""Randomness as a pure function of (seed, purpose, step): no generator state has to survive a restart.

Whatever a step draws (order, crops, masks, dropped paths) is a function of the run's seed and the step's number alone,
so a resumed run, a job in a sweep and an undisturbed run draw the same numbers without storing any state.
"""

from hashlib import blake2b

import torch
from torch import Generator


def derive(seed: int, *stream: int | str) -> int:
    """A 63-bit seed from the run's seed and any names or counters, e.g. `derive(0, "masks", step)`."""
    digest = blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *stream: int | str) -> Generator:
    """A CPU generator that is seeded with `derive(seed, *stream)`."""
    return Generator().manual_seed(derive(seed, *stream))


def seed_global(seed: int, *stream: int | str) -> None:
    """Seed torch's global generators (all devices): stochastic depth and dropout draw from them."""
    torch.manual_seed(derive(seed, *stream))
