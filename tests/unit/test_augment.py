"""Crops, flips and color changes: against torchvision image by image, and as functions of their generator."""

import pytest
import torch
from torch import Generator, Tensor
from torchvision.transforms import functional as TF

from hjepa.config.errors import UserError
from hjepa.data import color as color
from hjepa.data.augment import Augment

EVERYTHING = {"jitter": 0.8, "grayscale": 0.3, "blur": 0.5, "solarize": 0.3}


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def some_images(count: int = 6, side: int = 24) -> Tensor:
    """Random images with gray, black, white and saturated ones among them."""
    images = torch.rand(count, 3, side, side, generator=seeded(7))
    images[0] = images[0, :1]
    images[1, :, : side // 2] = 0
    images[1, :, side // 2 :] = 1
    images[2, 1:] = 0
    return images


def apply(augment: Augment, images: Tensor, seed: int = 0) -> Tensor:
    return augment(images, augment.draw(len(images), seeded(seed)))


def only(**options: float) -> Augment:
    """No crop and no flip."""
    return Augment([1.0, 1.0], [1.0, 1.0], 0.0, **options)


def test_crops_match_torchvision_for_the_same_boxes() -> None:
    """The one resampling of the batch equals cropping and resizing each image on its own."""
    augment = Augment([0.3, 0.9], [0.8, 1.25], 0.0)
    images = torch.nn.functional.avg_pool2d(torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)), 5, 1, 2)
    numbers = augment.draw(6, seeded(1))
    out = augment(images, numbers)
    boxes = augment.boxes(numbers, augment.scale)
    for image, box, got in zip(images, boxes, out, strict=True):
        width, height = box[0, 0].item() * 64, box[1, 1].item() * 64
        left, top = (box[0, 2].item() + 1) * 32 - width / 2, (box[1, 2].item() + 1) * 32 - height / 2
        assert -1e-4 <= left <= 64 - width + 1e-4
        assert -1e-4 <= top <= 64 - height + 1e-4
        assert 0.29 <= width * height / 64**2 <= 0.91
        x = left + (torch.arange(64) + 0.5) * width / 64 - 0.5
        y = top + (torch.arange(64) + 0.5) * height / 64 - 0.5
        nearest = image[:, y.round().long().clamp(0, 63)][:, :, x.round().long().clamp(0, 63)]
        assert (got - nearest).abs().mean() < 0.02


def test_flip_and_identity() -> None:
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(apply(Augment([1.0, 1.0], [1.0, 1.0], 0.0), images), images)
    flipped = apply(Augment([1.0, 1.0], [1.0, 1.0], 1.0), images)
    assert torch.allclose(flipped, images.flip(-1), atol=1e-5)


def test_augmentation_differs_between_images() -> None:
    image = torch.rand(1, 3, 16, 16).expand(8, 3, 16, 16)
    out = apply(Augment([0.3, 1.0], [0.75, 1.33], 0.5), image)
    assert len(torch.unique(out.flatten(1), dim=0)) == 8


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_jitters_match_torchvision(name: str) -> None:
    images = some_images()
    amounts = torch.tensor([-0.5, -0.2, 0.0, 0.1, 0.37, 0.5]) if name == "hue" else torch.tensor([0.0, 0.3, 0.7, 1.0, 1.4, 2.0])
    ours = getattr(color, f"adjust_{name}")(images, amounts)
    theirs = torch.stack([getattr(TF, f"adjust_{name}")(i, a.item()) for i, a in zip(images, amounts, strict=True)])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("side", "radius"), [(24, 6), (9, 3), (5, 4)])
def test_blur_matches_torchvision(side: int, radius: int) -> None:
    images, sigmas = some_images(side=side), torch.tensor([0.1, 0.5, 1.0, 1.3, 2.0, 4.0])
    theirs = [TF.gaussian_blur(i, [2 * radius + 1] * 2, [s.item()] * 2) for i, s in zip(images, sigmas, strict=True)]
    torch.testing.assert_close(color.blur(images, sigmas, radius), torch.stack(theirs), atol=1e-5, rtol=0)


def test_blur_wider_than_the_image_is_cut_off() -> None:
    images = some_images(side=4)
    assert color.blur(images, torch.full((6,), 2.0), 6).shape == images.shape


def test_grayscale_and_solarize_match_torchvision() -> None:
    images = some_images()
    gray = apply(only(grayscale=1.0), images)
    torch.testing.assert_close(gray, torch.stack([TF.rgb_to_grayscale(i, 3) for i in images]))
    inverted = apply(only(solarize=1.0, solarize_threshold=0.3), images)
    torch.testing.assert_close(inverted, torch.stack([TF.solarize(i, 0.3) for i in images]))


def test_same_generator_same_pixels() -> None:
    images, augment = some_images(), Augment([0.3, 1.0], [0.75, 1.33], 0.5, **EVERYTHING)
    torch.manual_seed(0)
    first = apply(augment, images, 3)
    torch.manual_seed(1)
    assert torch.equal(first, apply(augment, images, 3)), "the global generator has no part in it"
    assert not torch.equal(first, apply(augment, images, 4))


def test_a_divided_batch_comes_out_the_same() -> None:
    images, augment = some_images(), Augment([0.3, 1.0], [0.75, 1.33], 0.5, **EVERYTHING)
    numbers, rows = augment.draw(len(images), seeded()), torch.tensor([0, 2, 5])
    torch.testing.assert_close(augment(images[rows], numbers[:, rows]), augment(images, numbers)[rows])


def test_what_is_off_draws_nothing_and_leaves_crop_and_flip_as_they_were() -> None:
    images = some_images()
    off = only(jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)
    numbers = torch.rand(5, 6, generator=seeded())
    assert torch.equal(off.draw(6, seeded()), numbers)
    assert torch.equal(off(images, numbers), images)
    assert torch.equal(apply(only(jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0), images), images)
    plain = Augment([0.3, 1.0], [0.75, 1.33], 0.5)
    assert torch.equal(plain(images, numbers), plain.crop(images, numbers, None, plain.scale))


@pytest.mark.parametrize("option", ["jitter", "grayscale", "blur", "solarize"])
def test_probabilities_are_per_image(option: str) -> None:
    image = some_images()[5:].expand(400, -1, -1, -1)
    out = apply(only(**{option: 0.3}), image)
    changed = (out != image).flatten(1).any(1)
    assert 0.2 < changed.float().mean() < 0.4
    different = len(torch.unique(out[changed].flatten(1), dim=0))
    assert different == (changed.sum() if option in ("jitter", "blur") else 1), "each by an amount of its own"


def test_images_do_not_touch_one_another() -> None:
    """Exchanging one image of a batch changes its own result only."""
    images, augment = some_images(), Augment([0.3, 1.0], [0.75, 1.33], 0.5, **EVERYTHING)
    others = images.clone()
    others[3] = images[4]
    a, b = apply(augment, images), apply(augment, others)
    assert (a != b).flatten(1).any(1).tolist() == [False, False, False, True, False, False]


def test_pixels_stay_pixels_and_the_input_stays_as_it_is() -> None:
    images = some_images(64)
    before = images.clone()
    strong = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
    out = apply(Augment([0.3, 1.0], [0.75, 1.33], 0.5, **EVERYTHING, **strong), images)
    assert torch.equal(images, before)
    assert out.min() >= -1e-5
    assert out.max() <= 1 + 1e-5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"jitter": 1.5}, "augment.jitter=1.5: expected a probability"),
        ({"blur": -0.1}, "augment.blur=-0.1: expected a probability"),
        ({"hue": 0.6}, "augment.hue=0.6: expected 0 to 0.5"),
        ({"brightness": 1.2}, "augment.brightness=1.2: expected 0 to 1"),
        ({"blur_sigma": [2.0, 1.0]}, r"augment.blur_sigma=\[2.0, 1.0\]"),
        ({"blur_sigma": [1.0]}, r"augment.blur_sigma=\[1.0\]"),
        ({"solarize_threshold": 128.0}, "augment.solarize_threshold=128.0: expected 0 to 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        only(**options)
