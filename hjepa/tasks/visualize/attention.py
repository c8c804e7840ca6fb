"""Attention maps of the summary tokens, or of the mean patch without them: one block alone, and the rollout of all blocks."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hjepa.plotting import ColorScale, GridCell, image_grid
from hjepa.tasks.trained_run import NETWORK_KINDS, NetworkKind
from hjepa.tasks.visualize.samples import Samples


def check_attention(samples: Samples) -> None:
    """Raise `UserError` if the encoder has no attention maps."""
    for layer in samples.single_layers:
        samples.networks["trained"].blocks(layer)


def draw_attention(samples: Samples) -> list[Path]:
    """Draw, for every layer, the attention of its last block and the rollout, of the trained and of the untrained network."""
    return [draw_layer_attention(samples, layer) for layer in samples.single_layers]


def draw_layer_attention(samples: Samples, layer: str) -> Path:
    """Draw the attention maps of one layer."""
    headings, columns = ["image"], [[GridCell(image) for image in samples.images]]
    maps = {kind: attention_maps(samples, kind, layer) for kind in NETWORK_KINDS}
    for i, name in enumerate(("attention", "rollout")):
        high = torch.cat([maps[kind][i].flatten() for kind in NETWORK_KINDS]).quantile(0.99).item()
        scale = ColorScale(f"{name}, 1 = uniform", 0.0, max(high, 1.0))
        for kind in NETWORK_KINDS:
            headings.append(f"{name}\n{kind}")
            columns.append([GridCell(attention, scale) for attention in maps[kind][i]])
    queries = "summary tokens" if samples.networks["trained"].blocks(layer)[1] else "mean patch"
    path = samples.path("attention", layer)
    image_grid(
        list(zip(*columns, strict=True)),
        headings,
        f"Attention of the {queries}, {layer}",
        path,
        "Attention: last block, mean over heads. Rollout: all blocks (Abnar and Zuidema 2020).",
    )
    return path


def attention_maps(samples: Samples, kind: NetworkKind, layer: str) -> tuple[Tensor, Tensor]:
    """Return attention and rollout [B, side, side] of the summary tokens or the mean patch; uniform attention is 1."""
    network = samples.networks[kind]
    blocks, num_summary = network.blocks(layer)
    with record_attention(blocks) as weights:
        network.tokens_on_cpu(samples.normalized(samples.shown))
    maps = []
    for matrix in (weights[-1].mean(1), rollout(weights)):
        queries = matrix[:, :num_summary] if num_summary else matrix
        attention = queries.mean(1)[:, num_summary:]
        side = int(attention.shape[1] ** 0.5)
        maps.append((attention / attention.mean(1, keepdim=True)).unflatten(1, (side, side)))
    return maps[0], maps[1]


@contextlib.contextmanager
def record_attention(blocks: list[Any]) -> Iterator[list[Tensor]]:
    """Record the attention weights [B, heads, n, n] of every pass through these timm blocks, on the CPU.

    The fused attention of timm never computes the weights, so it is switched off within the context.
    """
    weights: list[Tensor] = []
    fused = [block.attn.fused_attn for block in blocks]
    hooks = [block.attn.attn_drop.register_forward_hook(lambda *call: weights.append(call[-1].float().cpu())) for block in blocks]
    try:
        for block in blocks:
            block.attn.fused_attn = False
        yield weights
    finally:
        for block, hook, was_fused in zip(blocks, hooks, fused, strict=True):
            block.attn.fused_attn = was_fused
            hook.remove()


def rollout(weights: list[Tensor]) -> Tensor:
    """Return the attention rollout (Abnar and Zuidema 2020), the product over blocks of (mean over heads + identity) / 2.

    Args:
        weights: Attention weights [B, heads, n, n] of every block.

    Returns:
        The rollout [B, n, n].
    """
    identity = torch.eye(weights[0].shape[-1])
    product = identity.expand(len(weights[0]), -1, -1)
    for block in weights:
        product = (0.5 * block.mean(1) + 0.5 * identity) @ product
    return product
