"""The mask contract, on every sampler and grid."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node
from hjepa.masking import (
    HierarchicalMasking,
    InverseBlockMasking,
    Masks,
    MaskSampler,
    MultiblockMasking,
    NoMasking,
    PartitionMasking,
    RandomMasking,
)
from hjepa.masking.geometry import cells_to_patches

SAMPLERS: dict[str, Callable[[int, list[int]], MaskSampler]] = {
    "multiblock": lambda g, p: MultiblockMasking(g, p, [0.05, 0.2], [0.75, 1.5], [0.85, 1.0], 2),
    "hierarchical": lambda g, p: HierarchicalMasking(g, p, [[0.05, 0.1], [0.1, 0.25]], [0.75, 1.5], [0.85, 1.0], [2, 1]),
    "random": lambda g, p: RandomMasking(g, p, 0.6, 2),
    "block": lambda g, p: InverseBlockMasking(g, p, [0.2, 0.4], [0.75, 1.5], 3),
    "partition": lambda g, p: PartitionMasking(g, p, 4),
}


def check_contract(masks: Masks, grid: int, pools: list[int], batch: int) -> None:
    """Assert that masks keep to the contract in the docstring of `hjepa.masking.base`."""
    b, c, k = masks.context.shape
    assert b == batch
    assert k >= 1
    assert len(masks.targets) == len(pools)
    context = masks.context
    assert context.dtype == torch.int64
    assert context.min() >= 0
    assert context.max() < grid**2
    assert (context.diff(dim=-1) > 0).all(), "context sorted, without repeats"
    for pool, target in zip(pools, masks.targets, strict=True):
        assert target.shape[:2] == (b, c)
        assert target.shape[2] >= 1
        assert target.shape[3] >= 1
        assert target.min() >= 0
        assert target.max() < (grid // pool) ** 2
        assert (target.diff(dim=-1) > 0).all(), "targets sorted, without repeats"
        patches = cells_to_patches(target, grid, pool).flatten(2)
        seen = torch.zeros(b, c, grid**2, dtype=torch.bool).scatter_(2, context, True)
        assert not seen.gather(2, patches).any(), "no target cell contains a context patch"


@pytest.mark.parametrize("kind", SAMPLERS)
@settings(max_examples=60)
@given(
    grid=st.integers(4, 32),
    pools=st.sampled_from([[1], [1, 2], [1, 2, 4], [1, 1]]),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_contract(kind: str, grid: int, pools: list[int], batch: int, seed: int) -> None:
    grid -= grid % max(pools)
    if grid // max(pools) < 2:
        grid = 2 * max(pools)
    try:
        sampler = SAMPLERS[kind](grid, pools)
    except UserError:
        return  # the grid is too small; the next test pins which grids must work
    masks = sampler(batch, torch.Generator().manual_seed(seed))
    check_contract(masks, grid, pools, batch)
    assert masks.context.shape[1] == sampler.num_contexts


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("grid", [4, 6, 8, 14, 16, 32])
@pytest.mark.parametrize("pools", [[1], [1, 2]])
def test_usual_grids_work(kind: str, grid: int, pools: list[int]) -> None:
    if kind == "partition" and (grid // max(pools)) ** 2 % 4:
        with pytest.raises(UserError, match="num_parts"):
            SAMPLERS[kind](grid, pools)
        return
    sampler = SAMPLERS[kind](grid, pools)
    for seed in range(20):
        check_contract(sampler(5, torch.Generator().manual_seed(seed)), grid, pools, 5)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_same_generator_same_masks_and_global_state_untouched(kind: str) -> None:
    sampler = SAMPLERS[kind](8, [1, 2])
    state = torch.get_rng_state()
    first, second, other = (sampler(4, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first.context, second.context)
    assert all(torch.equal(a, b) for a, b in zip(first.targets, second.targets, strict=True))
    assert first.context.shape != other.context.shape or not torch.equal(first.context, other.context)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", SAMPLERS)
def test_every_patch_can_be_context_and_target(kind: str) -> None:
    sampler = SAMPLERS[kind](8, [1, 2])
    seen, hidden = torch.zeros(64, dtype=torch.bool), torch.zeros(64, dtype=torch.bool)
    for seed in range(60):
        masks = sampler(16, torch.Generator().manual_seed(seed))
        seen[masks.context.flatten()] = True
        hidden[masks.targets[0].flatten()] = True
    assert seen.all()
    assert hidden.all()


def test_levels_of_multiblock_cover_the_same_regions() -> None:
    masks = SAMPLERS["multiblock"](16, [1, 2, 4])(6, torch.Generator().manual_seed(0))
    regions = [cells_to_patches(t, 16, p).sort(-1).values for t, p in zip(masks.targets, [1, 2, 4], strict=True)]
    assert torch.equal(regions[0], regions[1])
    assert torch.equal(regions[0], regions[2])


def test_partition_parts_are_disjoint_and_complete() -> None:
    masks = SAMPLERS["partition"](8, [1])(3, torch.Generator().manual_seed(0))
    assert torch.equal(masks.context.flatten(1).sort(1).values, torch.arange(64).expand(3, 64))
    together = torch.cat([masks.context, masks.targets[0].squeeze(2)], dim=2).sort(-1).values
    assert torch.equal(together, torch.arange(64).expand(3, 4, 64))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_patches_are_hidden_without_levels_too(kind: str) -> None:
    masks = SAMPLERS[kind](8, [])(3, torch.Generator().manual_seed(0))
    assert masks.context.shape[-1] < 64
    assert masks.targets == ()


def test_without_masking_every_patch_is_context() -> None:
    masks = NoMasking(3, [])(2, torch.Generator())
    assert masks.context.tolist() == [[list(range(9))]] * 2
    assert masks.targets == ()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiblockMasking(4, [1], [0.5, 0.6], [1.0, 1.0], [0.85, 1.0], 4), "leave no context"),
        (lambda: HierarchicalMasking(4, [1, 2], [[0.5, 0.9]], [1.0, 1.0], [0.85, 1.0], [4]), "leave no context"),
        (lambda: HierarchicalMasking(4, [1, 2], [[0.5, 0.9]], [1.0, 1.0], [0.85, 1.0], []), "entry per level"),
        (lambda: RandomMasking(4, [1], 0.01, 1), "target_share"),
        (lambda: RandomMasking(4, [1], 0.99, 1), "target_share"),
        (lambda: InverseBlockMasking(4, [2], [0.9, 1.0], [1.0, 1.0], 1), "context_scale"),
        (lambda: PartitionMasking(5, [1], 4), "num_parts=4"),
        (lambda: NoMasking(4, [1]), "levels=none"),
    ],
)
def test_impossible_masks_are_refused_at_once(build: Callable[[], MaskSampler], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize(
    ("target", "option", "value"),
    [
        ("MultiblockMasking", "target_scale", [0.2, 0.1]),
        ("MultiblockMasking", "target_aspect", [1.0]),
        ("MultiblockMasking", "context_scale", [0.85, 1.1]),
        ("MultiblockMasking", "blocks", 0),
        ("HierarchicalMasking", "target_scale", [[0.1, 0.2], [0.0, 0.2]]),
        ("HierarchicalMasking", "blocks", [2, 0]),
        ("RandomMasking", "target_share", 0.0),
        ("RandomMasking", "target_share", 1.0),
        ("RandomMasking", "contexts", 0),
        ("InverseBlockMasking", "context_aspect", [0.0, 1.0]),
    ],
)
def test_options_out_of_bounds_are_refused(target: str, option: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^masking\.{option}="):
        check_node("masking", {"_target_": f"hjepa.masking.{target}", option: value})
