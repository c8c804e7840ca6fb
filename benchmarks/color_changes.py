"""Time the color transforms of a batch, each image by its own amount: `python -m benchmarks.color_changes`.

Compares hjepa with kornia, whose functions take a batch (`pip install kornia`), and with torchvision v2, whose functions have to
be called once per image. The three alternate within each repeat, so that a busy machine slows all of them down alike.
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

from hjepa.data import color

RADIUS = 6  # of the blur, in pixels
THRESHOLD = 0.5
Implementations = tuple[Callable[[], Tensor], Callable[[], Tensor], Callable[[], Tensor]]  # hjepa, kornia, torchvision


def transforms(x: Tensor) -> dict[str, Implementations]:
    """Return the three implementations of every transform of images [B, 3, H, W], with equal amounts."""
    count, kernel = len(x), 2 * RADIUS + 1
    factor, shift, sigma = 0.6 + 0.8 * torch.rand(count), 0.2 * torch.rand(count) - 0.1, 0.1 + 1.9 * torch.rand(count)
    broadcast_factor = factor.view(-1, 1, 1, 1)

    def each(transform: Callable[[Tensor, int], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.stack([transform(x[i], i) for i in range(count)])

    return {
        "brightness": (
            lambda: color.adjust_brightness(x, factor),
            lambda: enhance.adjust_brightness_accumulative(x, broadcast_factor),
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
            lambda: color.adjust_hue(x, shift),
            lambda: enhance.adjust_hue(x, 2 * torch.pi * shift),
            each(lambda image, i: V2.adjust_hue(image, shift[i].item())),
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


def milliseconds(implementations: Implementations, repeats: int) -> list[float]:
    """Return the median time of each implementation."""
    seconds: list[list[float]] = [[] for _ in implementations]
    for repeat in range(repeats + 1):
        for implementation, times in zip(implementations, seconds, strict=True):
            start = time.perf_counter()
            implementation()
            if repeat:  # the first one warms up
                times.append(time.perf_counter() - start)
    return [1000 * median(times) for times in seconds]


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print(f"{'milliseconds per batch':<24}{'hjepa':>10}{'kornia':>10}{'torchvision':>13}")
    for count, size, repeats in ((64, 32, 25), (32, 224, 9)):
        totals = [0.0, 0.0, 0.0]
        for name, implementations in transforms(torch.rand(count, 3, size, size)).items():
            times = milliseconds(implementations, repeats)
            totals = [total + elapsed for total, elapsed in zip(totals, times, strict=True)]
            print(f"{count} x {size} px {name:<12}{times[0]:>10.2f}{times[1]:>10.2f}{times[2]:>13.2f}")
        print(f"{count} x {size} px {'all':<12}{totals[0]:>10.2f}{totals[1]:>10.2f}{totals[2]:>13.2f}", flush=True)


if __name__ == "__main__":
    main()
