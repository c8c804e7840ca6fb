"""The procedural dataset `shapes` is deterministic and balanced, and its labels are not linear in the pixels."""

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node
from hjepa.data import shapes

LABELS = ("whole", "part")

Sample = tuple[Tensor, dict[str, Tensor]]


@pytest.fixture(scope="module")
def train() -> Sample:
    return shapes.generate(10_000, 32, seed=1)


@pytest.fixture(scope="module")
def test() -> Sample:
    return shapes.generate(2_000, 32, seed=2)


def _with_global_seed(seed: int) -> Sample:
    """Generate under a global random state and assert that the state is not changed."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    torch_before, numpy_before = torch.get_rng_state(), repr(np.random.get_state())
    sample = shapes.generate(50, 32, seed=7)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert repr(np.random.get_state()) == numpy_before
    return sample


def test_images_depend_on_the_seed_alone() -> None:
    first = _with_global_seed(3)
    second = _with_global_seed(4)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in LABELS)


def test_seeds_give_different_images() -> None:
    images, labels = shapes.generate(200, 16, seed=0)
    others, other_labels = shapes.generate(200, 16, seed=1)
    assert (images != others).flatten(1).any(1).all()
    assert all((labels[name] != other_labels[name]).float().mean() > 0.7 for name in LABELS)


def test_images_of_one_call_differ() -> None:
    images, _ = shapes.generate(500, 16)
    assert len(np.unique(images.flatten(1).numpy(), axis=0)) == 500


@pytest.mark.parametrize("count", [1, 7, 10, 99, 1234])
def test_labels_are_balanced(count: int) -> None:
    _, labels = shapes.generate(count, 16, seed=count)
    for name, names in zip(LABELS, (shapes.WHOLES, shapes.PARTS), strict=True):
        counts = torch.bincount(labels[name], minlength=len(names))
        assert len(counts) == len(names) == 10
        assert counts.max() - counts.min() <= 1


def test_labels_are_independent_and_shuffled() -> None:
    _, labels = shapes.generate(2_050, 16)
    pairs = torch.bincount(labels["whole"] * 10 + labels["part"], minlength=100)
    assert pairs.max() - pairs.min() <= 1
    for name in LABELS:
        assert (labels[name][1:] == labels[name][:-1]).float().mean() < 0.15
        first = torch.bincount(labels[name][:1000], minlength=10)
        assert first.min() > 60
        assert first.max() < 140


@pytest.mark.parametrize("size", [16, 17, 32, 48, 64])
def test_any_size(size: int) -> None:
    images, labels = shapes.generate(12, size)
    assert images.dtype == torch.uint8
    assert images.shape == (12, 3, size, size)
    assert set(labels) == set(LABELS)
    assert all(label.dtype == torch.int64 and label.shape == (12,) for label in labels.values())


def test_all_images_of_several_chunks_are_rendered() -> None:
    images, _ = shapes.generate(250, 64)
    assert (images.float().flatten(1).std(1) > 10).all()


def test_a_seed_shows_the_same_scenes_at_any_size() -> None:
    small, labels = shapes.generate(100, 32, seed=5)
    large, large_labels = shapes.generate(100, 64, seed=5)
    assert all(torch.equal(labels[name], large_labels[name]) for name in LABELS)
    reduced = torch.nn.functional.avg_pool2d(large.float(), 2)
    assert (reduced - small.float()).abs().mean() < 8  # of 255; the pixel noise alone makes about 6


def test_options_out_of_bounds_are_refused() -> None:
    with pytest.raises(UserError, match=r"image_size=15.*at least 16 pixels"):
        shapes.generate(10, size=15)
    for option, value in (("train", 0), ("test", 0), ("data_seed", -1)):
        with pytest.raises(UserError, match=rf"dataset\.{option}={value}"):
            check_node("dataset", {"_target_": "hjepa.data.Shapes", option: value})


def test_elements_contrast_with_background() -> None:
    """Nearly every element differs from the background by 0.15 in luminance; half of them are lighter."""
    scenes = shapes._sample_scenes(500, seed=4)
    images, _ = shapes.generate(500, 32, seed=4)
    cover = shapes._coverage(scenes, 32)
    gray = np.einsum("nchw,c->nhw", images.numpy() / 255.0, shapes._LUMA)
    outside = cover.max(1) < 0.01
    ground = (gray * outside).sum((1, 2)) / outside.sum((1, 2))
    inside = cover > 0.9
    seen = inside.sum((2, 3)) > 2
    level = (gray[:, None] * inside).sum((2, 3)) / np.maximum(inside.sum((2, 3)), 1)
    gap = (level - ground[:, None])[seen]
    assert (np.abs(gap) > 0.15).mean() > 0.97
    assert 0.45 < (gap > 0).mean() < 0.55


def test_elements_stay_apart_and_inside() -> None:
    """Elements of an image hardly overlap and hardly leave it, so that every part mask is complete."""
    scenes = shapes._sample_scenes(500, seed=6)
    cover = shapes._coverage(scenes, 64)
    assert (cover.sum((2, 3)) > 0).sum() == scenes.present.sum()
    shared = cover.sum(1) - cover.max(1)
    assert shared.sum() < 0.01 * cover.sum()
    middle = dataclasses.replace(scenes, center=np.zeros_like(scenes.center))
    assert cover.sum() > 0.98 * shapes._coverage(middle, 64).sum()


@pytest.mark.slow
def test_labels_are_not_linear_in_the_pixels(train: Sample, test: Sample) -> None:
    """A ridge classifier on pixels stays near chance (10 %), so that both labels require learning."""
    pixels, test_pixels = (images.flatten(1).numpy().astype(np.float32) for images, _ in (train, test))
    scaler = StandardScaler().fit(pixels)
    pixels, test_pixels = scaler.transform(pixels), scaler.transform(test_pixels)
    for name in LABELS:
        model = RidgeClassifier(alpha=1000.0).fit(pixels, train[1][name].numpy())
        assert model.score(test_pixels, test[1][name].numpy()) < 0.3


def _figures(images: Tensor) -> npt.NDArray[np.float32]:
    """Return centered figure masks [N, S * S]: the pixels of an image that are far from its median."""
    gray = np.einsum("nchw,c->nhw", images.numpy(), shapes._LUMA)
    mask = np.abs(gray - np.median(gray, axis=(1, 2), keepdims=True)) > 0.11 * 255
    half = images.shape[-1] // 2
    for index, figure in enumerate(mask):
        rows, columns = np.nonzero(figure)
        mask[index] = np.roll(figure, (half - round(rows.mean()), half - round(columns.mean())), (0, 1))
    figures: npt.NDArray[np.float32] = mask.reshape(len(mask), -1).astype(np.float32)
    return figures


def test_labels_are_in_the_images(train: Sample, test: Sample) -> None:
    """Without the nuisances of color and position, nearest neighbors read both labels."""
    figures, test_figures = _figures(train[0][:5000]), _figures(test[0][:1000])
    for name in LABELS:
        model = KNeighborsClassifier(5).fit(figures, train[1][name][:5000].numpy())
        assert model.score(test_figures, test[1][name][:1000].numpy()) > 0.7
