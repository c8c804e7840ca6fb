"""An exported encoder as a model of timm: the files that build it, and how its outputs become features and tokens.

The weights are in `model.safetensors`, and `config.json` is what timm expects in a folder of its model hub, so that
`timm.create_model("local-dir:FOLDER", pretrained=True)` is the model. Besides timm's keys it has one of this package, whose
`outputs` is the name of the function of `OUTPUTS` that computes features and tokens with the model. The README of an export shows
the same computation.

An encoder that JSON cannot describe has a `timm.json` instead, with arguments of `timm.create_model` and `outputs` ("tokens" if
there is none). Exports of earlier versions have it too.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hjepa.models.conv_stem import conv_embed
from hjepa.models.encoder import Encoder
from hjepa.models.timm_encoder import stage_maps
from hjepa.tasks.trained_run import TrainedRun

FeaturesAndTokens = tuple[Tensor, Tensor]

WEIGHTS = "model.safetensors"
WEIGHT_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


class TimmModel(NamedTuple):
    """A model of timm in evaluation mode.

    Attributes:
        module: The model.
        encode: Function from the model and normalized images [B, 3, S, S] to features [B, F] and tokens [B, T + N, D].
    """

    module: nn.Module
    encode: Callable[[Any, Tensor], FeaturesAndTokens]


def has_timm_model(encoder: Encoder) -> bool:
    """Return whether timm has models of the kind of an encoder."""
    return type(encoder).export_spec is not Encoder.export_spec


def write_timm_model(run: TrainedRun, folder: Path) -> None:
    """Write the weights of a run's encoder, and config.json or timm.json.

    Raises:
        UserError: If timm has no such model.
    """
    spec, outputs = dict(run.encoder.export_spec()), outputs_of(run.encoder)
    name = spec.pop("model_name").partition(".")[0]  # a tag would name other weights
    weights = {name: value.contiguous() for name, value in run.encoder.state_dict().items()}
    (folder / WEIGHTS).write_bytes(save(weights, {"format": "pt"}))
    if "embed_layer" in spec:  # its value holds the arguments of `conv_embed`
        source = {"file": WEIGHTS, "custom_load": False} | pretrained_config(run, name, spec)
        content = {"model_name": name, **spec, "pretrained": True, "pretrained_cfg_overlay": source, "outputs": outputs}
    else:
        arguments = {key: value for key, value in spec.items() if key not in WEIGHT_ARGUMENTS}
        content = {
            "architecture": name,
            "num_classes": 0,
            "num_features": run.encoder.layer_dims[-1],
            "model_args": arguments,
            "pretrained_cfg": pretrained_config(run, name, spec),
            "hjepa": {"outputs": outputs},
        }
    file = folder / ("timm.json" if "embed_layer" in spec else "config.json")
    file.write_text(json.dumps(content, indent=2) + "\n")


def pretrained_config(run: TrainedRun, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return what timm calls the pretrained config: the preprocessing, and the names of first convolution and classifier.

    Nothing else of the config of timm's own weights is repeated, such as their license.
    """
    size, data, known = run.encoder.image_size, run.config["dataset"], timm.get_pretrained_cfg(name)
    return {
        "num_classes": 0,
        "input_size": [3, size, size],
        "fixed_input_size": bool(known and known.fixed_input_size and spec.get("strict_img_size", True)),
        "pool_size": None,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bilinear",
        "mean": data["mean"],
        "std": data["std"],
        "first_conv": known and known.first_conv,
        "classifier": known and known.classifier,
    }


def read_call(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the arguments of `timm.create_model` in the folder of an export, and the name of the function of its outputs.

    The value of `embed_layer`, if present, holds the arguments of `conv_embed`.
    """
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
        return {"model_name": "local-dir:.", "pretrained": True}, config["hjepa"]["outputs"]
    call = json.loads((folder / "timm.json").read_text())
    return call, call.pop("outputs", "tokens")


def load_timm_model(folder: Path) -> TimmModel:
    """Return the timm model of an exported encoder."""
    call, outputs = read_call(folder)
    if "embed_layer" in call:
        call["embed_layer"] = conv_embed(**call["embed_layer"])
    with contextlib.chdir(folder):  # the arguments contain paths relative to the folder
        return TimmModel(timm.create_model(**call).eval(), OUTPUTS[outputs])


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
