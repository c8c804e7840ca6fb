"""The procedural dataset `shapes` is deterministic and balanced, and its labels are not linear in the pixels."""

import dataclasses
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node
from hjepa.data import shapes
from hjepa.data.shapes_scenes import LUMA, Scenes, sample_scenes

generate = partial(shapes.generate, fade=0.6)
CLASSES = {"part": shapes.PARTS, "whole": shapes.WHOLES, "fade": shapes.FADES}

Sample = tuple[Tensor, dict[str, Tensor]]


@pytest.fixture(scope="module")
def train() -> Sample:
    return generate(10_000, 32, seed=1)


@pytest.fixture(scope="module")
def test() -> Sample:
    return generate(2_000, 32, seed=2)


def _with_global_seed(seed: int) -> Sample:
    """Generate under a global random state and assert that the state is not changed."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    torch_before, numpy_before = torch.get_rng_state(), repr(np.random.get_state())
    sample = generate(50, 32, seed=7)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert repr(np.random.get_state()) == numpy_before
    return sample


def test_images_depend_on_the_seed_alone() -> None:
    first = _with_global_seed(3)
    second = _with_global_seed(4)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in CLASSES)


def test_seeds_give_different_images() -> None:
    images, labels = generate(200, 16, seed=0)
    others, other_labels = generate(200, 16, seed=1)
    assert (images != others).flatten(1).any(1).all()
    assert all((labels[name] != other_labels[name]).float().mean() > 0.7 for name in CLASSES)


def test_images_of_one_call_differ() -> None:
    images, _ = generate(500, 16)
    assert len(np.unique(images.flatten(1).numpy(), axis=0)) == 500


@pytest.mark.parametrize("count", [1, 7, 10, 99, 1234])
def test_labels_are_balanced(count: int) -> None:
    _, labels = generate(count, 16, seed=count)
    for name, names in CLASSES.items():
        counts = torch.bincount(labels[name], minlength=len(names))
        assert len(counts) == len(names)
        assert counts.max() - counts.min() <= (2 if name == "fade" else 1)


def test_labels_are_independent_and_shuffled() -> None:
    _, labels = generate(2_050, 16)
    pairs = labels["whole"] * 10 + labels["part"]
    for combinations, number in ((pairs, 100), (pairs * 6 + labels["fade"], 600)):
        counts = torch.bincount(combinations, minlength=number)
        assert counts.max() - counts.min() <= 1
    for name, names in CLASSES.items():
        assert (labels[name][1:] == labels[name][:-1]).float().mean() < 1.5 / len(names)
        first = torch.bincount(labels[name][:1000], minlength=len(names)) * len(names) / 1000
        assert first.min() > 0.6
        assert first.max() < 1.4


@pytest.mark.parametrize("size", [16, 17, 32, 48, 64])
def test_any_size(size: int) -> None:
    images, labels = generate(12, size)
    assert images.dtype == torch.uint8
    assert images.shape == (12, 3, size, size)
    assert list(labels) == list(CLASSES)
    assert all(label.dtype == torch.int64 and label.shape == (12,) for label in labels.values())


def test_all_images_of_several_chunks_are_rendered() -> None:
    images, _ = generate(250, 64)
    assert (images.float().flatten(1).std(1) > 10).all()


def test_a_seed_shows_the_same_scenes_at_any_size() -> None:
    small, labels = generate(100, 32, seed=5)
    large, large_labels = generate(100, 64, seed=5)
    assert all(torch.equal(labels[name], large_labels[name]) for name in CLASSES)
    reduced = torch.nn.functional.avg_pool2d(large.float(), 2)
    assert (reduced - small.float()).abs().mean() < 8  # of 255; the pixel noise alone makes about 6


def test_options_out_of_bounds_are_refused() -> None:
    with pytest.raises(UserError, match=r"image_size=15.*at least 16 pixels"):
        generate(10, size=15)
    for option, value in (("train", 0), ("test", 0), ("data_seed", -1)):
        with pytest.raises(UserError, match=rf"dataset\.{option}={value}"):
            check_node("dataset", {"_target_": "hjepa.data.Shapes", option: value})


def test_elements_contrast_with_background() -> None:
    """Nearly every element differs from the background by 0.15 in luminance; half of them are lighter."""
    scenes = sample_scenes(500, seed=4)
    images, _ = generate(500, 32, seed=4)
    cover = shapes._coverage(scenes, 32)
    gray = np.einsum("nchw,c->nhw", images.numpy() / 255.0, LUMA)
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
    scenes = sample_scenes(500, seed=6)
    cover = shapes._coverage(scenes, 64)
    assert (cover.sum((2, 3)) > 0).sum() == scenes.present.sum()
    shared = cover.sum(1) - cover.max(1)
    assert shared.sum() < 0.01 * cover.sum()
    middle = dataclasses.replace(scenes, center=np.zeros_like(scenes.center))
    assert cover.sum() > 0.98 * shapes._coverage(middle, 64).sum()


def test_fades_change_nothing_else() -> None:
    """Images with and without fades are the same except for the pixels of the elements."""
    images, labels = generate(100, 32, seed=3)
    plain, plain_labels = shapes.generate(100, 32, seed=3)
    assert plain_labels.keys() == {"part", "whole"}
    assert all(torch.equal(plain_labels[name], labels[name]) for name in plain_labels)
    changed = (images != plain).any(1).numpy()
    covered = shapes._coverage(sample_scenes(100, seed=3), 32).max(1)
    assert not changed[covered == 0].any()
    assert changed[covered == 1].mean() > 0.9


def _fade_directions(scenes: Scenes, size: int) -> npt.NDArray[np.float32]:
    """Return unit vectors [N, E, 2] from the strong side of each element to the faint one, as drawn on discs."""
    discs = dataclasses.replace(scenes, part=np.full_like(scenes.part, shapes.PARTS.index("disc")))
    cover, axis = shapes._coverage(discs, size), shapes._pixel_centers(size)
    middle, strong = (
        np.stack([weight.sum(2) @ axis, weight.sum(3) @ axis], -1) / weight.sum((2, 3)).clip(1)[..., None]
        for weight in (cover, cover * shapes._contrast(discs, size, 0.6))
    )
    direction: npt.NDArray[np.float32] = (middle - strong) / np.linalg.norm(middle - strong, axis=-1, keepdims=True).clip(1e-6)
    return direction


def _outward_directions(scenes: Scenes) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return unit vectors [N, E, 2] from the center of the figure to its elements, and which elements have one [N, E]."""
    low, high = (
        edge(np.where(scenes.present[..., None], scenes.center, sign * np.inf), 1) for edge, sign in ((np.min, 1), (np.max, -1))
    )
    outward = scenes.center - ((low + high) / 2)[:, None]
    distance = np.linalg.norm(outward, axis=-1, keepdims=True)
    return outward / distance.clip(1e-6), scenes.present & (distance[..., 0] > 0.1)


def test_elements_fade_as_the_label_says() -> None:
    scenes = sample_scenes(600, seed=8)
    faint = _fade_directions(scenes, 64)
    outward, has_outward = _outward_directions(scenes)
    radial = (faint * outward).sum(-1)
    alignment = {
        "up": -faint[..., 1],
        "down": faint[..., 1],
        "sideways": np.abs(faint[..., 0]),
        "inward": -radial,
        "outward": radial,
        "around": np.sqrt(1 - radial.clip(-1, 1) ** 2),
    }
    for kind, name in enumerate(shapes.FADES):
        elements = (scenes.present if name in ("up", "down", "sideways") else has_outward) & (scenes.fade == kind)[:, None]
        assert alignment[name][elements].min() > 0.7, name


def test_mirror_images_of_fades_are_of_the_same_class() -> None:
    """Half of the images that fade sideways do so to the left, and half of those that fade around do so clockwise."""
    scenes = sample_scenes(3000, seed=9)
    outward, has_outward = _outward_directions(scenes)
    x, y = np.cos(scenes.fade_angle), np.sin(scenes.fade_angle)
    clockwise = outward[..., 0] * y - outward[..., 1] * x
    for name, turn, elements in (("sideways", x, scenes.present), ("around", clockwise, has_outward)):
        rows = scenes.fade == shapes.FADES.index(name)
        side = np.where(elements, np.sign(turn), 0)[rows].sum(1) / elements[rows].sum(1)
        assert (np.abs(side) == 1).all()  # all elements of an image turn the same way
        assert 0.4 < (side > 0).mean() < 0.6


def test_fade_is_no_statistic_of_colors() -> None:
    """The sorted brightness of an image, its mean color and the number of its dark pixels do not tell the fade."""
    images, labels = generate(3000, 32, seed=10)
    gray = np.einsum("nchw,c->nhw", images.numpy(), LUMA).reshape(len(images), -1)
    distance = np.sort(np.abs(gray - np.median(gray, axis=1, keepdims=True)), axis=1)[:, ::64]
    colors = images.float().flatten(2).mean(2).numpy()
    dark = (gray < 64).mean(1, keepdims=True)
    statistics = np.concatenate([distance, colors, dark], axis=1)
    model = RandomForestClassifier(20, min_samples_leaf=5, random_state=0).fit(statistics[:2000], labels["fade"][:2000].numpy())
    assert model.score(statistics[2000:], labels["fade"][2000:].numpy()) < 0.22  # chance is 0.167


@pytest.mark.thorough
def test_labels_are_not_linear_in_the_pixels(train: Sample, test: Sample) -> None:
    """A ridge classifier on pixels stays near chance (10 % and 17 %), so that all labels require learning."""
    pixels, test_pixels = (images.flatten(1).numpy().astype(np.float32) for images, _ in (train, test))
    scaler = StandardScaler().fit(pixels)
    pixels, test_pixels = scaler.transform(pixels), scaler.transform(test_pixels)
    for name in CLASSES:
        model = RidgeClassifier(alpha=1000.0).fit(pixels, train[1][name].numpy())
        assert model.score(test_pixels, test[1][name].numpy()) < 0.3


def _figures(images: Tensor) -> npt.NDArray[np.float32]:
    """Return centered figure masks [N, S * S]: the pixels of an image that are far from its median."""
    gray = np.einsum("nchw,c->nhw", images.numpy(), LUMA)
    mask = np.abs(gray - np.median(gray, axis=(1, 2), keepdims=True)) > 0.11 * 255
    half = images.shape[-1] // 2
    for index, figure in enumerate(mask):
        rows, columns = np.nonzero(figure)
        mask[index] = np.roll(figure, (half - round(rows.mean()), half - round(columns.mean())), (0, 1))
    figures: npt.NDArray[np.float32] = mask.reshape(len(mask), -1).astype(np.float32)
    return figures


def test_labels_are_in_the_images(train: Sample, test: Sample) -> None:
    """Without the nuisances of color and position, nearest neighbors read part and whole."""
    figures, test_figures = _figures(train[0][:5000]), _figures(test[0][:1000])
    for name in ("part", "whole"):
        model = KNeighborsClassifier(5).fit(figures, train[1][name][:5000].numpy())
        assert model.score(test_figures, test[1][name][:1000].numpy()) > 0.7
