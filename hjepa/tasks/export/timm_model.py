"""An exported encoder as a model of timm: the arguments that build it, and how its outputs become features and tokens.

The file timm.json holds the arguments of `timm.create_model` and, under `outputs`, the name of the function of `OUTPUTS` that
computes features and tokens with the model ("tokens" if there is none). The README of an export shows the same computation.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hjepa.models.conv_stem import conv_embed
from hjepa.models.encoder import Encoder
from hjepa.models.timm_encoder import stage_maps
from hjepa.tasks.trained_run import TrainedRun

FeaturesAndTokens = tuple[Tensor, Tensor]


class TimmModel(NamedTuple):
    """A model of timm in evaluation mode.

    Attributes:
        module: The model.
        encode: Function from the model and normalized images [B, 3, S, S] to features [B, F] and tokens [B, T + N, D].
    """

    module: nn.Module
    encode: Callable[[Any, Tensor], FeaturesAndTokens]


def timm_call(run: TrainedRun) -> dict[str, Any]:
    """Return the content of timm.json: how to build the encoder of a run and load encoder.safetensors.

    The value of `embed_layer`, if present, holds the arguments of `conv_embed`.
    """
    size, data = run.encoder.image_size, run.config["dataset"]
    call = run.encoder.export_spec() | {
        "pretrained": True,
        "pretrained_cfg_overlay": {
            "file": "encoder.safetensors",
            "custom_load": False,
            "num_classes": 0,
            "input_size": [3, size, size],
            "mean": data["mean"],
            "std": data["std"],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
    }
    outputs = outputs_of(run.encoder)
    return call if outputs == "tokens" else call | {"outputs": outputs}


def load_timm_model(folder: Path) -> TimmModel:
    """Return the timm model of an exported encoder."""
    with contextlib.chdir(folder):  # timm.json contains the name of the weights file, without its folder
        call = json.loads(Path("timm.json").read_text())
        if "embed_layer" in call:
            call["embed_layer"] = conv_embed(**call["embed_layer"])
        encode = OUTPUTS[call.pop("outputs", "tokens")]
        return TimmModel(timm.create_model(**call).eval(), encode)


def outputs_of(encoder: Encoder) -> str:
    """Return the name of the function in `OUTPUTS` that computes the features and the tokens of an encoder."""
    if isinstance(encoder, VisionTransformer):
        return "blocks" if encoder.pooled == "all" else "tokens"
    return "maps" if encoder.pooled == "all" else "map"


def encode_by_tokens(model: Any, images: Tensor) -> FeaturesAndTokens:
    """Return the features of the last block of a ViT, whose own output is the mean patch token, and the tokens."""
    tokens, patches = model.forward_features(images), model(images)
    summary = tokens[:, : model.num_prefix_tokens]
    return torch.cat([patches, summary.mean(1)], dim=1) if model.num_prefix_tokens else patches, tokens


def encode_by_blocks(model: Any, images: Tensor) -> FeaturesAndTokens:
    """Return the features of all blocks of a ViT, and the tokens of the last one, which alone is normalized."""
    tokens, blocks = model.forward_intermediates(images, output_fmt="NLC", return_prefix_tokens=True)
    count = model.num_prefix_tokens
    parts = [part for block in blocks[:-1] for part in (block if count else (block,))]
    parts += [tokens[:, count:], tokens[:, :count]] if count else [tokens]
    return torch.cat([part.mean(1) for part in parts], dim=1), tokens


def encode_by_map(model: Any, images: Tensor) -> FeaturesAndTokens:
    """Return the features and the tokens of the last stage of a model without summary tokens."""
    (last,) = stage_maps(model, images, [len(model.feature_info) - 1])
    return last.mean((2, 3)), last.flatten(2).mT


def encode_by_maps(model: Any, images: Tensor) -> FeaturesAndTokens:
    """Return the features of all stages of a model without summary tokens, and the tokens of the last one."""
    maps = stage_maps(model, images, list(range(len(model.feature_info))))
    return torch.cat([stage.mean((2, 3)) for stage in maps], dim=1), maps[-1].flatten(2).mT


OUTPUTS = {"tokens": encode_by_tokens, "blocks": encode_by_blocks, "map": encode_by_map, "maps": encode_by_maps}
