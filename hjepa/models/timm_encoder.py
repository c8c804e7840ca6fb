"""Networks of timm with stages, such as ResNet, ConvNeXt, EfficientNet, RegNet and Swin, as encoders."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from hjepa.config.errors import UserError, first_line
from hjepa.config.types import PositiveInt
from hjepa.models.conv_stem import mask_images
from hjepa.models.encoder import Encoder, Stage
from hjepa.models.maps import cell_index, map_tokens


class TimmEncoder(Encoder):
    """A model of timm; the layers of the encoder are the stages that the `feature_info` of the model lists.

    The encoder has the parameters and the state dict of the model. If the model ends with a norm, before or after its pooling,
    the norm is applied to every cell of the last stage. All other parameters that the stages do not use, such as those of a head
    convolution, stay in the state dict and are frozen.

    Where patches are masked, hidden pixels, and hidden cells after every stage, are set to 0 (SparK, Tian et al. 2023). Inside a
    stage, cells beyond the mask can take values again, which depend on visible pixels only. Unlike in SparK, the statistics of
    batch norm in training include the hidden cells; networks with layer norm, such as ConvNeXt, have no such statistics. A
    masked image costs as much as a complete one.

    Args:
        image_size: Side of the images in pixels, a multiple of `patch_size`.
        patch_size: Side of a cell of the last stage in pixels, which is 32 for most models.
        name: Name of the model in timm.
        options: Further arguments of `timm.create_model`, such as drop_path_rate.
        num_summary_tokens: Not used; the encoder has no summary tokens.
    """

    network: Any  # the model of timm

    def __init__(
        self,
        image_size: PositiveInt,
        patch_size: PositiveInt,
        name: str,
        options: dict[str, Any],
        num_summary_tokens: int = 0,
    ) -> None:
        super().__init__()
        check_name(name)
        pretrained = timm.get_pretrained_cfg(name)
        self.classifier = str(pretrained.classifier if pretrained else "")
        takes_size = bool(pretrained and pretrained.fixed_input_size)
        self.fixed_size = takes_size and options.get("strict_img_size", True)
        sizes = {"img_size": image_size} if takes_size else {}
        self.architecture: dict[str, Any] = {"model_name": name, "num_classes": 0, **sizes, **options}
        network = create_network(self.architecture)
        self.stage_names = [info["module"] for info in network.feature_info]
        self.reductions = [info["reduction"] for info in network.feature_info]
        check_stages(name, self.reductions, image_size, patch_size)
        self.image_size, self.patch_size, self.num_summary_tokens = image_size, patch_size, 0
        self.layer_dims = tuple(info["num_chs"] for info in network.feature_info)
        # The encoder and the model have the same parameters, buffers and modules, so that their state dicts are equal. The model
        # is no module of the encoder, in which case its name would precede the keys.
        self._parameters, self._buffers, self._modules = network._parameters, network._buffers, network._modules
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self.__dict__["network"] = network
        self.visible: Tensor | None = None
        try:
            for stage in self.stage_names:  # a bound method: the copy of an encoder has hooks of its own
                network.get_submodule(stage).register_forward_hook(self.hide)
            self.freeze_unused()
        except UserError:
            raise
        except Exception as error:  # models of timm declare their stages in several ways
            raise UserError(
                f"model.encoder.name={name} cannot be used, because it does not return its stages as timm declares them "
                f"({type(error).__name__}: {first_line(error)}); use a model such as resnet18 or convnext_atto."
            ) from error

    def forward(
        self, images: Float[Tensor, "b 3 h w"], keep: Int[Tensor, "b c k"] | None = None, layers: Sequence[int] | None = None
    ) -> list[Stage]:
        """Return the tokens after the given stages; see `Encoder.forward`."""
        numbers, grid = list(layers or [self.num_layers]), images.shape[-1] // self.patch_size
        self.check_size(images.shape[-1])
        kept = None
        if keep is not None:
            ones = images.new_ones(len(images), 3, grid, grid)
            self.visible = mask_images(ones, keep, 1).flatten(0, 1)[:, :1]
            images, kept = mask_images(images, keep, self.patch_size).flatten(0, 1), keep.flatten(0, 1)
        try:
            maps = stage_maps(self.network, images, [number - 1 for number in numbers])
        finally:
            self.visible = None
        ratios = [self.patch_size // self.reductions[number - 1] for number in numbers]
        return [
            Stage(map_tokens(x, cell_index(kept, grid, ratio)), grid * ratio, 0) for x, ratio in zip(maps, ratios, strict=True)
        ]

    def hide(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Set the hidden cells of the output of a stage to 0: a forward hook."""
        if self.visible is None:
            return output
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise UserError(
                f"model.encoder.name={self.architecture['model_name']}: the outputs of its stages are no maps, so that patches "
                "cannot be masked; use a model with stages such as resnet18, convnext_atto or swin_tiny_patch4_window7_224."
            )
        last = is_channels_last(self.network)
        side = output.shape[1:3] if last else output.shape[2:4]
        mask = F.interpolate(self.visible, size=side)  # nearest neighbor: the side is a multiple of that of the patch grid
        return output * (mask.permute(0, 2, 3, 1) if last else mask).to(output.dtype)

    def train(self, mode: bool = True) -> "TimmEncoder":
        """Set the training mode of the model too, which is no module of the encoder."""
        self.network.training = mode
        super().train(mode)
        return self

    def check_size(self, size: int) -> None:
        """Raise `UserError` for crops of another size if the model takes images of one size only."""
        if self.fixed_size and size != self.image_size:
            raise UserError(
                f"Crops of {size} pixels (dataset.local_size or dataset.early_size): {self.architecture['model_name']} encodes "
                f"images of {self.image_size} pixels only; set dataset.local_views=0 and dataset.early_size=null, use a network "
                "such as model.encoder.name=convnext_atto or, for Swin, set +model.encoder.options.strict_img_size=false."
            )

    def freeze_unused(self) -> None:
        """Freeze the parameters on which no stage depends; otherwise, they would have no gradient in training."""
        training = self.training
        self.eval()
        with torch.enable_grad():
            stages = self(torch.zeros(1, 3, self.image_size, self.image_size), None, range(1, self.num_layers + 1))
            total = torch.stack([stage.tokens.sum() for stage in stages]).sum()
            parameters = list(self.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True):
                parameter.requires_grad_(gradient is not None)
        self.train(training)

    @torch.no_grad()
    def check_masks(self) -> None:
        training = self.training
        self.eval()
        self(torch.zeros(1, 3, self.image_size, self.image_size), torch.zeros(1, 1, 1, dtype=torch.int64))
        self.train(training)

    @property
    def layer_grids(self) -> tuple[int, ...]:
        return tuple(self.image_size // reduction for reduction in self.reductions)

    def layer_ids(self) -> dict[str, int]:
        """Return the number of its stage for every parameter, 0 before the first stage and `num_layers` + 1 after the last.

        Parameters between two stages belong to the latter. If the first stage has no parameters, such as the activation function
        after the stem of a ResNet, it consists of what precedes it.
        """
        positions = {name: i for i, (name, _) in enumerate(self.network.named_modules())}
        stages = [self.network.get_submodule(name) for name in self.stage_names]
        starts = [positions[name] for name in self.stage_names]
        ends = [start + sum(1 for _ in stage.modules()) for start, stage in zip(starts, stages, strict=True)]
        has_stem = any(True for _ in stages[0].parameters())
        ids = {}
        for name, _ in self.named_parameters():
            position = positions[name.rpartition(".")[0]]
            ids[name] = 0 if has_stem and position < starts[0] else 1 + sum(position >= end for end in ends)
        return ids

    def adapt_state_dict(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the classifier of a state dict of timm."""
        own = self.state_dict().keys()
        return {name: value for name, value in weights.items() if name in own or not name.startswith(f"{self.classifier}.")}

    def export_spec(self) -> dict[str, Any]:
        return self.architecture


def check_name(name: str) -> None:
    """Raise `UserError` if timm has no model of this name."""
    if not timm.is_model(name):
        matches = get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(matches)}?" if matches else "timm.list_models() returns all names."
        raise UserError(f"model.encoder.name={name}: expected the name of a model of timm {timm.__version__}; {hint}")


def create_network(arguments: dict[str, Any]) -> Any:
    """Create a model of timm.

    Raises:
        UserError: If the model does not accept an argument, or does not return the outputs of its stages.
    """
    name = arguments["model_name"]
    try:
        network = timm.create_model(**arguments)
    except TypeError as error:
        raise UserError(f"model.encoder.options: timm.create_model does not accept them for {name} ({error}).") from error
    if not hasattr(network, "forward_intermediates") or not hasattr(network, "feature_info"):
        raise UserError(
            f"model.encoder.name={name} does not return the outputs of stages (forward_intermediates in timm); use a model that "
            "does, such as resnet18 or convnext_atto."
        )
    return network


def check_stages(name: str, reductions: list[int], image_size: int, patch_size: int) -> None:
    """Raise `UserError` if a model has no stages, or the patches are not the cells of its last stage."""
    if len(set(reductions)) < 2:
        raise UserError(
            f"model.encoder.name={name} has no stages, since all its blocks have the same grid; use a model with stages such as "
            "resnet18 or convnext_atto, or model=vit_nano for a plain ViT."
        )
    if patch_size != reductions[-1]:
        raise UserError(
            f"model.patch_size={patch_size}: a cell of the last stage of {name} is {reductions[-1]} pixels wide; "
            f"set model.patch_size={reductions[-1]}."
        )
    if image_size % patch_size:
        raise UserError(
            f"dataset.image_size={image_size}: {name} needs a multiple of {patch_size}, the side of a cell of its last stage."
        )


def is_channels_last(network: nn.Module) -> bool:
    """Return whether the stages of a model have outputs [B, H, W, D] instead of [B, D, H, W]."""
    return getattr(network, "output_fmt", "NCHW") == "NHWC"


def final_norm(network: Any) -> nn.Module | None:
    """Return the norm at the end of a model, which the outputs of its stages lack, or None."""
    modules, width = dict(network.named_modules()), network.feature_info[-1]["num_chs"]
    norms = [modules[name] for name in ("norm", "head.norm") if name in modules]
    return next((norm for norm in norms if [len(p) for p in norm.parameters()][:1] == [width]), None)


def stage_maps(network: Any, images: Float[Tensor, "b 3 h w"], indices: list[int]) -> list[Float[Tensor, "b _ _ _"]]:
    """Return the outputs [B, D, H, W] of stages of a timm model, that of the last stage after the final norm.

    Args:
        network: Model of timm.
        images: Normalized images.
        indices: Ascending positions in the `feature_info` of the model.
    """
    maps: list[Tensor] = network.forward_intermediates(images, indices=indices, intermediates_only=True, output_fmt="NCHW")
    norm = final_norm(network)
    if norm is not None and indices[-1] == len(network.feature_info) - 1:
        by_cell = isinstance(norm, nn.LayerNorm) and not isinstance(norm, LayerNorm2d)
        maps[-1] = norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if by_cell else norm(maps[-1])
    return maps
