"""The contract between encoders and everything that uses them.

An encoder maps images to the tokens of its layers: the blocks of a ViT, or the stages of a hierarchical network, whose widths
and grids differ. Levels, predictor, probes, pictures, export and layer-wise learning rates rely on the class `Encoder` below
and on nothing else. To add an encoder, derive a class from `Encoder`, list it in `hjepa/models/__init__.pyi`, and write a file
in `conf/model/` whose `encoder._target_` names it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hjepa.config.errors import UserError


class Stage(NamedTuple):
    """The tokens after one layer of an encoder.

    A named tuple and not a dataclass, because the hooks of FSDP find tensors in tuples only.

    Attributes:
        tokens: Float [M, S+K, D], the S summary tokens first, then a token for each of K cells.
        grid: Side of the square grid of cells into which the layer divides the whole image.
        num_summary: Number S of summary tokens.
    """

    tokens: Tensor
    grid: int
    num_summary: int

    @property
    def summary(self) -> Tensor:
        """Summary tokens [M, S, D]."""
        return self.tokens[:, : self.num_summary]

    @property
    def cells(self) -> Tensor:
        """Tokens of the cells [M, K, D]."""
        return self.tokens[:, self.num_summary :]


class Encoder(nn.Module, ABC):
    """The base class of all encoders.

    The constructor takes `image_size`, `patch_size` and `num_summary_tokens` as keywords, besides its own options. Repeated
    modules (such as transformer blocks) belong in an attribute `blocks` of the encoder or of one of its modules: those are
    compiled, sharded and recomputed one by one.

    Attributes:
        image_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels. Masks keep or drop whole patches.
        layer_dims: Token width of every layer; layers are numbered from 1.
        num_summary_tokens: Number of summary tokens. An encoder without such tokens ignores the argument and sets 0.
        layer_name: What tables and pictures call a layer, such as "stage" in "stage 3".
        pooled: Layers of which `features` consist: "last" or "all". `HJEPA` sets it to the option `model.features`.
    """

    image_size: int
    patch_size: int
    layer_dims: tuple[int, ...]
    num_summary_tokens: int
    layer_name: ClassVar[str] = "stage"
    pooled: Literal["last", "all"] = "last"

    @abstractmethod
    def forward(
        self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b c k"] | None = None, layers: Sequence[int] | None = None
    ) -> list[Stage]:
        """Encode images, or several contexts of each image.

        Args:
            images: Normalized images of any square size that `patch_size` divides; local crops are smaller than `image_size`.
            keep: Indices of the K patches that each of C contexts consists of. The output must not depend on other patches.
                None keeps all patches.
            layers: Ascending numbers of the layers to return, in 1..num_layers. None returns the last layer.

        Returns:
            One stage per layer. With `keep`, the tokens are [B*C, S+K, D] in the order of `keep`; otherwise [B, S+N, D] in
            raster order. A layer whose grid is r times finer than that of the patches has r*r tokens per patch; with `keep`,
            those of one patch follow one another.
        """

    @abstractmethod
    def layer_ids(self) -> dict[str, int]:
        """Return the layer of every parameter, for layer-wise learning rates.

        Embeddings belong to layer 0, the parameters of layer i to i, and everything after the last layer to num_layers + 1.
        """

    @property
    def grid(self) -> int:
        """Side of the grid of patches. The last layer has this grid; earlier layers have the same or an integer multiple."""
        return self.image_size // self.patch_size

    @property
    def layer_grids(self) -> tuple[int, ...]:
        """Side of the grid of every layer; encoders whose early layers have finer grids override it."""
        return (self.grid,) * self.num_layers

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_dims)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def feature_dims(self) -> tuple[int, ...]:
        """Width of the pooled features of every layer."""
        return tuple((2 if self.num_summary_tokens else 1) * dim for dim in self.layer_dims)

    @property
    def feature_layers(self) -> list[int]:
        """Ascending numbers of the layers of which `features` consist."""
        return list(range(1, self.num_layers + 1)) if self.pooled == "all" else [self.num_layers]

    @property
    def feature_dim(self) -> int:
        """Width of `features`."""
        return sum(self.feature_dims[layer - 1] for layer in self.feature_layers)

    @staticmethod
    def pool_tokens(stage: Stage) -> Float[Tensor, "m f"]:
        """Return the mean token of the cells, followed by the mean summary token if the encoder has summary tokens."""
        cells = stage.cells.mean(1)
        return torch.cat([cells, stage.summary.mean(1)], dim=1) if stage.num_summary else cells

    def pool_stages(self, stages: Sequence[Stage]) -> Float[Tensor, "m f"]:
        """Return the pooled tokens of several stages side by side."""
        return torch.cat([self.pool_tokens(stage) for stage in stages], dim=1)

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b f"]:
        """Return the image features that probes and exports use: the pooled tokens of the last layer or of all layers."""
        return self.pool_stages(self(images, layers=self.feature_layers))

    def check_masks(self) -> None:
        """Raise `UserError` if the encoder can encode whole images only."""

    def adapt_state_dict(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert the state dict of a related network, such as a classifier, to one of this encoder where possible."""
        return weights

    def unused_names(self, weights: dict[str, Tensor], adapted: dict[str, Tensor]) -> list[str]:
        """Return the names in a state dict of which `adapt_state_dict` made no use, given its result."""
        used = {id(value) for value in adapted.values()}
        return [name for name, value in weights.items() if name not in adapted and id(value) not in used]

    def attention_blocks(self, layer: int) -> list[nn.Module]:
        """Return the timm blocks up to a layer, whose attention maps over all tokens are to be drawn.

        Raises:
            UserError: If the encoder has no such maps.
        """
        raise UserError(f"{type(self).__name__} has no attention maps; leave attention out of task.pictures.")

    def export_spec(self) -> dict[str, Any]:
        """Return the arguments of `timm.create_model` for a model with the same state dict.

        Raises:
            UserError: If timm has no such model.
        """
        raise UserError(
            f"timm has no model that loads the weights of {type(self).__name__}; use task.formats=[torch_export], which needs "
            "nothing but PyTorch, or task.formats=[onnx]."
        )
