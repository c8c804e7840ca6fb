"""What changing the colors of a batch costs, each image by an amount of its own: `python -m benchmarks.color_changes`.

This framework's functions beside kornia's, which take a batch (pip install kornia), and torchvision v2's, which have to be called
once per image. All three take turns within each repeat, so that a busy machine slows them alike.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
import torchvision.transforms.v2.functional as V2
from kornia import enhance
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from torch import Tensor

from hjepa.data import color as color

RADIUS = 6  # pixels of the blur
THRESHOLD = 0.5
Rivals = tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]


def changes(x: Tensor) -> dict[str, Rivals]:
    """For every change the three ways to make it, the same amounts for all."""
    count, kernel = len(x), 2 * RADIUS + 1
    factor, turn, sigma = 0.6 + 0.8 * torch.rand(count), 0.2 * torch.rand(count) - 0.1, 0.1 + 1.9 * torch.rand(count)
    wide = factor.view(-1, 1, 1, 1)

    def each(change: Callable[[Tensor, int], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.stack([change(x[i], i) for i in range(count)])

    return {
        "brightness": (
            lambda: color.adjust_brightness(x, factor),
            lambda: enhance.adjust_brightness_accumulative(x, wide),
            each(lambda image, i: V2.adjust_brightness(image, factor[i].item())),
        ),
        "contrast": (
            lambda: color.adjust_contrast(x, factor),
            lambda: enhance.adjust_contrast_with_mean_subtraction(x, factor),
            each(lambda image, i: V2.adjust_contrast(image, factor[i].item())),
        ),
        "saturation": (
            lambda: color.adjust_saturation(x, factor),
            lambda: enhance.adjust_saturation_with_gray_subtraction(x, factor),
            each(lambda image, i: V2.adjust_saturation(image, factor[i].item())),
        ),
        "hue": (
            lambda: color.adjust_hue(x, turn),
            lambda: enhance.adjust_hue(x, 2 * torch.pi * turn),
            each(lambda image, i: V2.adjust_hue(image, turn[i].item())),
        ),
        "grayscale": (
            lambda: color.luma(x).expand_as(x).contiguous(),
            lambda: rgb_to_grayscale(x).expand_as(x).contiguous(),
            each(lambda image, i: V2.rgb_to_grayscale(image, 3)),
        ),
        "blur": (
            lambda: color.blur(x, sigma, RADIUS),
            lambda: gaussian_blur2d(x, (kernel, kernel), sigma.view(-1, 1).expand(-1, 2)),
            each(lambda image, i: V2.gaussian_blur(image, [kernel, kernel], [sigma[i].item()] * 2)),
        ),
        "solarize": (
            lambda: color.Solarize(THRESHOLD)(x, x.new_empty(0)),
            lambda: enhance.solarize(x, THRESHOLD),
            each(lambda image, i: V2.solarize(image, THRESHOLD)),
        ),
    }


def milliseconds(rivals: Rivals, repeats: int) -> list[float]:
    """Median time of each way."""
    seconds: list[list[float]] = [[] for _ in rivals]
    for repeat in range(repeats + 1):
        for way, times in zip(rivals, seconds, strict=True):
            began = time.perf_counter()
            way()
            if repeat:  # the first warms up
                times.append(time.perf_counter() - began)
    return [1000 * median(times) for times in seconds]


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print(f"{'milliseconds a batch':<24}{'here':>10}{'kornia':>10}{'torchvision':>13}")
    for count, size, repeats in ((64, 32, 25), (32, 224, 9)):
        totals = [0.0, 0.0, 0.0]
        for name, rivals in changes(torch.rand(count, 3, size, size)).items():
            figures = milliseconds(rivals, repeats)
            totals = [total + figure for total, figure in zip(totals, figures, strict=True)]
            print(f"{count} x {size} px {name:<12}{figures[0]:>10.2f}{figures[1]:>10.2f}{figures[2]:>13.2f}")
        print(f"{count} x {size} px {'all':<12}{totals[0]:>10.2f}{totals[1]:>10.2f}{totals[2]:>13.2f}", flush=True)


if __name__ == "__main__":
    main()
