"""Hiera as an encoder: the model of timm, of which any patches can be encoded."""

import json

import pytest
import timm
import torch
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.models.hiera import HieraEncoder, reroll, unroll
from hjepa.models.maps import cell_index, map_tokens

KEEP = torch.tensor([[0, 5, 6], [3, 8, 15]])  # of 4 x 4 patches


def small_encoder(**options: object) -> HieraEncoder:
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 16, "dim": 8, "stages": [1, 2, 2, 1], "positions": "learned"}
    return HieraEncoder(**(sizes | options)).eval()


@pytest.fixture(params=[[1, 2], [1, 1, 2], [1, 2, 2, 1]], ids=["two", "three", "four"])
def pair(request: pytest.FixtureRequest) -> tuple[HieraEncoder, nn.Module]:
    """Return an encoder with two to four stages, and the model of timm with the same weights."""
    encoder = small_encoder(stages=request.param)
    model = timm.create_model(**json.loads(json.dumps(encoder.export_spec()))).eval()
    model.load_state_dict(encoder.state_dict())
    return encoder, model


def test_stages_are_those_of_timm(pair: tuple[HieraEncoder, nn.Module]) -> None:
    encoder, model = pair
    images, layers = torch.randn(2, 3, 64, 64), list(range(1, encoder.num_layers + 1))
    expected = [x.flatten(2).mT for x in model.forward_intermediates(images, intermediates_only=True)]
    expected[-1] = model.head.norm(expected[-1])
    for stage, tokens in zip(encoder(images, layers=layers), expected, strict=True):
        torch.testing.assert_close(stage.tokens, tokens)


def test_stages_of_kept_patches_are_those_of_timm_with_a_mask(pair: tuple[HieraEncoder, nn.Module]) -> None:
    encoder, model = pair
    images, layers = torch.randn(2, 3, 64, 64), list(range(1, encoder.num_layers + 1))
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, KEEP, torch.ones(()).bool().expand(2, 3))
    _, expected = model.forward_features(images, mask=mask, return_intermediates=True)
    expected = [x.flatten(1, 3) for x in expected]
    expected[-1] = model.head.norm(expected[-1])
    for stage, tokens in zip(encoder(images, KEEP.unsqueeze(1), layers), expected, strict=True):
        torch.testing.assert_close(stage.tokens, tokens)


def test_dropped_patches_are_never_computed() -> None:
    encoder, counts = small_encoder(), []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: counts.append(output.shape[1]))
    encoder(torch.randn(2, 3, 64, 64), KEEP.unsqueeze(1))
    assert counts == [3 * 64, 3 * 16, 3 * 16, 3 * 4, 3 * 4, 3]


def test_rerolling_undoes_unrolling() -> None:
    x = torch.randn(2, 5, 16, 16)
    tokens = unroll(x, 2)
    assert tokens.shape == (2, 16, 16, 5)
    assert torch.equal(reroll(tokens.flatten(1, 2), 2, 4), map_tokens(x, None))
    kept = torch.take_along_dim(tokens, KEEP[:, None, :, None], dim=2)
    assert torch.equal(reroll(kept.flatten(1, 2), 2, None), map_tokens(x, cell_index(KEEP, 4, 4)))


def test_the_last_two_stages_attend_globally() -> None:
    encoder, images = small_encoder(), torch.randn(1, 3, 64, 64, requires_grad=True)

    def depends_on_other_patches(layer: int) -> bool:
        (gradient,) = torch.autograd.grad(encoder(images, layers=[layer])[0].tokens[0, 0].sum(), images)
        return bool(gradient[:, :, -16:, -16:].any())

    assert [depends_on_other_patches(layer) for layer in (1, 2, 3, 4)] == [False, False, True, True]


def published(name: str) -> tuple[HieraEncoder, dict[str, Tensor]]:
    """Return a small encoder of four stages and a checkpoint of timm of the same shape, with a classifier."""
    encoder = small_encoder(patch_size=32, image_size=64)
    options = encoder.architecture | {"img_size": 128, "num_classes": 10}
    return encoder, timm.create_model(name, **options).state_dict()


def test_weights_of_timm_are_adapted() -> None:
    encoder, weights = published("hiera_tiny_224")
    assert weights["pos_embed"].shape[1] == 4 * encoder.pos_embed.shape[1]
    encoder.load_state_dict(encoder.adapt_state_dict(weights))
    assert torch.equal(encoder.blocks[3].mlp.fc1.weight, weights["blocks.3.mlp.fc1.weight"])
    torch.testing.assert_close(encoder.pos_embed.mean(1), weights["pos_embed"].mean(1), atol=0.01, rtol=0)


def test_weights_of_the_authors_are_adapted() -> None:
    encoder, weights = published("hiera_tiny_224")
    renamed = {
        name.replace("head.norm.", "encoder_norm.").replace("head.fc.", "head.projection."): v for name, v in weights.items()
    }
    encoder.load_state_dict(
        encoder.adapt_state_dict(renamed | {"mask_token": torch.zeros(1), "decoder_norm.bias": torch.zeros(1)})
    )
    assert torch.equal(encoder.head.norm.weight, weights["head.norm.weight"])


def test_fixed_positions_are_not_trained() -> None:
    assert not small_encoder(positions="sincos").pos_embed.requires_grad
    assert small_encoder(positions="learned").pos_embed.requires_grad
    assert small_encoder(image_size=32).positions(16).shape == (256, 8), "positions are resampled for images of another size"


def test_layers_are_the_stages() -> None:
    ids = small_encoder().layer_ids()
    assert ids["patch_embed.proj.weight"] == ids["pos_embed"] == 0
    assert [ids[f"blocks.{i}.attn.qkv.weight"] for i in range(6)] == [1, 2, 2, 3, 3, 4]
    assert ids["head.norm.weight"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": [2]}, r"model.encoder.stages=\[2\]: expected the numbers of blocks of 2 to 4 stages"),
        ({"dim": 12, "heads": 8}, "model.encoder.dim=12 must be a multiple of 4 and of heads=8"),
        ({"image_size": 40}, "model.patch_size=16 does not divide dataset.image_size=40"),
        ({"patch_size": 4}, r"model.patch_size=4: the stages .* 3 times .* such as \[8, 16, 32\]"),
    ],
)
def test_sizes_that_do_not_fit_get_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_encoder(**options)
