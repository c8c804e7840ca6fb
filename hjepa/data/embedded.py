"""The embedded dataset, which needs no files."""

from typing import Literal

from torch import Tensor

from hjepa.data.dataset import Dataset, Split
from hjepa.data.shapes import PARTS, WHOLES, generate, patch_parts
from hjepa.errors import UserError


class Shapes(Dataset):
    """The embedded procedural dataset (see `hjepa.data.shapes`): labels `part` (kind of shape) and `whole` (arrangement).

    Args:
        train, test: numbers of images; data_seed: what they are drawn from.
    """

    def __init__(self, train: int, test: int, data_seed: int, **common: object) -> None:
        super().__init__(**common)  # type: ignore[arg-type]  # checked against Dataset's own signature
        if min(train, test) < 1:
            raise UserError(f"dataset.train={train} and dataset.test={test} must be at least 1.")
        self.sizes, self.data_seed = {"train": train, "test": test}, data_seed

    def load(self, split: Literal["train", "test"]) -> Split:
        images, labels = generate(self.sizes[split], self.image_size, self.seed(split))
        return Split(images, {name: labels[name] for name in ("part", "whole")})

    def seed(self, split: Literal["train", "test"]) -> int:
        """What a split is drawn from."""
        return 2 * self.data_seed + (split == "test")

    def patch_parts(self, split: Literal["train", "test"], patch: int, coverage: float) -> Tensor:
        """What every patch of the split's images shows, int64 [N, patches], see `hjepa.data.shapes.patch_parts`."""
        return patch_parts(self.sizes[split], self.image_size, self.seed(split), patch, coverage)

    def class_names(self, label: str) -> list[str]:
        return list({"part": PARTS, "whole": WHOLES}[label])
