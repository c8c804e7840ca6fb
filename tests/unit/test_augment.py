"""Crops, flips and color transforms equal torchvision's image by image, and depend on their generator alone."""

import pytest
import torch
from torch import Generator, Tensor
from torchvision.transforms import functional as TF

from hjepa.config.errors import UserError
from hjepa.config.schema import check_node
from hjepa.data import color
from hjepa.data.augment import Augment

EVERYTHING = {"jitter": 0.8, "grayscale": 0.3, "blur": 0.5, "solarize": 0.3}


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def some_images(count: int = 6, side: int = 24) -> Tensor:
    """Return random images; the first ones are gray, half black and half white, and saturated."""
    images = torch.rand(count, 3, side, side, generator=seeded(7))
    images[0] = images[0, :1]
    images[1, :, : side // 2] = 0
    images[1, :, side // 2 :] = 1
    images[2, 1:] = 0
    return images


def apply(augment: Augment, images: Tensor, seed: int = 0) -> Tensor:
    return augment(images, augment.sample_params(len(images), seeded(seed)))


def only(**options: float) -> Augment:
    """Return an augmentation that neither crops nor flips."""
    return Augment([1.0, 1.0], [1.0, 1.0], 0.0, **options)


def test_crops_match_torchvision_for_the_same_boxes() -> None:
    """One resampling of the batch equals cropping and resizing each image separately."""
    augment = Augment([0.3, 0.9], [0.8, 1.25], 0.0)
    images = torch.nn.functional.avg_pool2d(torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)), 5, 1, 2)
    params = augment.sample_params(6, seeded(1))
    out = augment(images, params)
    boxes = augment.crop_boxes(params, augment.scale)
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
    assert torch.equal(first, apply(augment, images, 3)), "the global generator is not used"
    assert not torch.equal(first, apply(augment, images, 4))


def test_a_divided_batch_comes_out_the_same() -> None:
    images, augment = some_images(), Augment([0.3, 1.0], [0.75, 1.33], 0.5, **EVERYTHING)
    params, rows = augment.sample_params(len(images), seeded()), torch.tensor([0, 2, 5])
    torch.testing.assert_close(augment(images[rows], params[:, rows]), augment(images, params)[rows])


def test_disabled_transforms_sample_nothing_and_leave_crop_and_flip_unchanged() -> None:
    images = some_images()
    off = only(jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)
    params = torch.rand(5, 6, generator=seeded())
    assert torch.equal(off.sample_params(6, seeded()), params)
    assert torch.equal(off(images, params), images)
    assert torch.equal(apply(only(jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0), images), images)
    plain = Augment([0.3, 1.0], [0.75, 1.33], 0.5)
    assert torch.equal(plain(images, params), plain.crop_and_flip(images, params, None, plain.scale))


@pytest.mark.parametrize("option", ["jitter", "grayscale", "blur", "solarize"])
def test_probabilities_are_per_image(option: str) -> None:
    image = some_images()[5:].expand(400, -1, -1, -1)
    out = apply(only(**{option: 0.3}), image)
    changed = (out != image).flatten(1).any(1)
    assert 0.2 < changed.float().mean() < 0.4
    different = len(torch.unique(out[changed].flatten(1), dim=0))
    assert different == (changed.sum() if option in ("jitter", "blur") else 1), "each image by its own amount"


def test_images_do_not_affect_one_another() -> None:
    """Replacing one image of a batch changes the result for this image only."""
    images, augment = some_images(), Augment([0.3, 1.0], [0.75, 1.33], 0.5, **EVERYTHING)
    others = images.clone()
    others[3] = images[4]
    a, b = apply(augment, images), apply(augment, others)
    assert (a != b).flatten(1).any(1).tolist() == [False, False, False, True, False, False]


def test_pixels_stay_in_range_and_the_input_is_not_modified() -> None:
    images = some_images(64)
    before = images.clone()
    strong = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
    out = apply(Augment([0.3, 1.0], [0.75, 1.33], 0.5, **EVERYTHING, **strong), images)
    assert torch.equal(images, before)
    assert out.min() >= -1e-5
    assert out.max() <= 1 + 1e-5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("scale", [0.5, 1.1]),
        ("ratio", [0.0, 1.0]),
        ("flip", 2.0),
        ("jitter", 1.5),
        ("blur", -0.1),
        ("brightness", 1.2),
        ("blur_sigma", [2.0, 1.0]),
        ("blur_sigma", [1.0]),
        ("solarize_threshold", 128.0),
    ],
)
def test_options_out_of_bounds_are_refused(option: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^dataset\.augment\.{option}="):
        check_node("dataset.augment", {"_target_": "hjepa.data.Augment", option: value})


def test_a_hue_shift_of_more_than_half_the_circle_is_refused() -> None:
    with pytest.raises(UserError, match=r"augment\.hue=0\.6: expected 0 to 0\.5"):
        only(hue=0.6)
