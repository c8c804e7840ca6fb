"""Attention: where the summary tokens (or, without any, the patches on average) look, in one block and through all of them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hjepa.plotting import GridCell, Scale, image_grid
from hjepa.tasks.trained_run import NETWORK_KINDS, NetworkKind
from hjepa.tasks.visualize.samples import Samples


def draw_attention(scene: Samples) -> list[Path]:
    """Per layer a picture: the images, the attention of the layer's last block, and the rollout, trained and untrained."""
    return [draw_layer(scene, layer) for layer in scene.layers]


def draw_layer(scene: Samples, layer: str) -> Path:
    """The picture of one layer."""
    columns, pictures = ["image"], [[GridCell(image) for image in scene.images]]
    maps = {kind: attention_maps(scene, kind, layer) for kind in NETWORK_KINDS}
    for i, what in enumerate(("attention", "rollout")):
        most = torch.cat([maps[kind][i].flatten() for kind in NETWORK_KINDS]).quantile(0.99).item()
        scale = Scale(f"{what}, 1 = evenly spread", 0.0, max(most, 1.0))
        for kind in NETWORK_KINDS:
            columns.append(f"{what}\n{kind}")
            pictures.append([GridCell(picture, scale) for picture in maps[kind][i]])
    who = "summary tokens" if scene.layer_features["trained"].blocks(layer)[1] else "mean patch"
    path = scene.path("attention", layer)
    image_grid(
        list(zip(*pictures, strict=True)),
        columns,
        f"Attention of the {who}, {layer}",
        path,
        "Attention: of the last block, mean of its heads. Rollout: through all blocks (Abnar and Zuidema 2020).",
    )
    return path


def attention_maps(scene: Samples, kind: NetworkKind, layer: str) -> tuple[Tensor, Tensor]:
    """Attention and rollout [B, side, side] of the summary tokens or the mean patch, where 1 is evenly spread attention."""
    network = scene.layer_features[kind]
    blocks, summary = network.blocks(layer)
    with recorded(blocks) as weights:
        network.tokens_on_cpu(scene.normalized(scene.rows))
    maps = []
    for matrix in (weights[-1].mean(1), rollout(weights)):
        rows = matrix[:, :summary] if summary else matrix
        seen = rows.mean(1)[:, summary:]
        side = int(seen.shape[1] ** 0.5)
        maps.append((seen / seen.mean(1, keepdim=True)).unflatten(1, (side, side)))
    return maps[0], maps[1]


@contextlib.contextmanager
def recorded(blocks: list[Any]) -> Iterator[list[Tensor]]:
    """Within the context, the attention weights [B, heads, n, n] of every pass through these timm blocks, on the CPU.

    timm computes weights at all only where its attention is not the fused one.
    """
    weights: list[Tensor] = []
    fused = [block.attn.fused_attn for block in blocks]
    hooks = [block.attn.attn_drop.register_forward_hook(lambda *call: weights.append(call[-1].float().cpu())) for block in blocks]
    try:
        for block in blocks:
            block.attn.fused_attn = False
        yield weights
    finally:
        for block, hook, was in zip(blocks, hooks, fused, strict=True):
            block.attn.fused_attn = was
            hook.remove()


def rollout(weights: list[Tensor]) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020): the product, over blocks, of (mean over heads + identity) / 2, [B, n, n]."""
    joint = torch.eye(weights[0].shape[-1]).expand(len(weights[0]), -1, -1)
    for block in weights:
        joint = (0.5 * block.mean(1) + 0.5 * torch.eye(block.shape[-1])) @ joint
    return joint
