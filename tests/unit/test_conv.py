"""Convolutional encoder and the masks of its maps."""

import pytest
import torch
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.models.conv import ConvEncoder, ConvStage, ConvUnit, SmallMapConv2d
from hjepa.models.maps import apply_to_cells, cell_index, map_tokens, stem_kernel, stem_stride


def small_encoder(**options: object) -> ConvEncoder:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "stem": 4, "dims": [8, 8, 16], "residuals": [0, 1, 1]}
    return ConvEncoder(**(sizes | options))


def outputs(encoder: ConvEncoder, images: Tensor, keep: Tensor | None) -> list[Tensor]:
    """Return the maps after the stem, and after every unit and stage, in the order of their computation."""
    maps: list[Tensor] = []
    for module in encoder.modules():
        if isinstance(module, ConvUnit | ConvStage):
            module.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    encoder(images, keep)
    return maps


def test_hidden_cells_are_zero_after_every_unit_and_every_stage() -> None:
    keep = torch.tensor([[[0, 5, 6]], [[3, 8, 15]]])
    maps = outputs(small_encoder(), torch.randn(2, 3, 32, 32), keep)
    assert [x.shape[-1] for x in maps] == [32, 16, 16, 8, 8, 8, 4, 4, 4]
    for x in maps:
        ratio = x.shape[-1] // 4
        visible = torch.zeros(2, x.shape[-1] ** 2).scatter_(1, cell_index(keep[:, 0], 4, ratio), 1.0).bool()
        cells = x.flatten(2).mT
        assert (cells[~visible] == 0).all()
        assert (cells[visible] != 0).any(-1).all(), "the mask does not grow"


def test_batch_statistics_are_those_of_the_visible_cells() -> None:
    encoder, keep = small_encoder(), torch.tensor([[[0, 5, 6]], [[3, 8, 15]]])
    inputs: list[Tensor] = []
    encoder.blocks[0].down.pool.register_forward_hook(lambda _module, _inputs, output: inputs.append(output))
    encoder(torch.randn(2, 3, 32, 32), keep)
    cells = map_tokens(inputs[0], cell_index(keep[:, 0], 4, 4)).flatten(0, 1)
    torch.testing.assert_close(encoder.blocks[0].down.norm.running_mean, 0.1 * cells.mean(0))
    torch.testing.assert_close(encoder.blocks[0].down.norm.running_var, 0.9 + 0.1 * cells.var(0))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (2, 3), (3, 3), (4, 3)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_on_a_small_map_the_matrix_product_is_the_convolution(size: tuple[int, int], kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = SmallMapConv2d(5, 7, kernel, stride, kernel // 2, bias=False).double()
    x = torch.randn(4, 5, *size, dtype=torch.double, requires_grad=True)
    actual, expected = conv(x), nn.functional.conv2d(x, conv.weight, None, stride, kernel // 2)
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn_like(expected)
    for output, of_conv2d in zip(
        torch.autograd.grad(actual, [x, conv.weight], gradient),
        torch.autograd.grad(expected, [x, conv.weight], gradient),
        strict=True,
    ):
        torch.testing.assert_close(output, of_conv2d)


def test_with_group_norm_images_do_not_depend_on_each_other() -> None:
    encoder, images, keep = small_encoder(norm="group"), torch.randn(3, 3, 32, 32), torch.tensor([[[0, 5, 6]]])
    torch.testing.assert_close(encoder(images, keep.expand(3, -1, -1))[0].tokens[:1], encoder(images[:1], keep)[0].tokens)


def test_tokens_are_a_view_of_a_map() -> None:
    encoder = small_encoder()
    maps = outputs(encoder, torch.randn(2, 3, 32, 32), None)
    assert maps[-1].is_contiguous(memory_format=torch.channels_last)
    assert map_tokens(maps[-1], None).data_ptr() == maps[-1].data_ptr()
    assert encoder.stem.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_stages_are_the_blocks_that_are_compiled_and_recomputed() -> None:
    encoder, images, keep = small_encoder().eval(), torch.randn(2, 3, 32, 32), torch.tensor([[[0, 5]], [[3, 8]]])
    before = encoder(images, keep)[0].tokens
    assert [type(block) for block in encoder.blocks] == [ConvStage] * 3
    torch.testing.assert_close(before, torch.stack([encoder(images[i : i + 1], keep[i : i + 1])[0].tokens[0] for i in range(2)]))


def test_layers_are_the_stages() -> None:
    ids = small_encoder().layer_ids()
    assert ids["stem.conv.weight"] == 0
    assert [ids[f"blocks.{i}.down.norm.weight"] for i in range(3)] == [1, 2, 3]
    assert ids["blocks.2.residuals.0.conv.weight"] == 3


def test_cells_of_a_patch_follow_one_another() -> None:
    assert cell_index(torch.tensor([[1, 2]]), 2, 2).tolist() == [[2, 3, 6, 7, 8, 9, 12, 13]]
    assert cell_index(torch.tensor([[1, 2]]), 2, 1).tolist() == [[1, 2]]


def test_a_function_of_cells_is_applied_to_the_given_ones() -> None:
    x, index = torch.randn(2, 3, 4, 4), torch.tensor([[0, 7], [3, 4]])
    visible = torch.zeros(2, 16).scatter_(1, index, 1.0).view(2, 1, 4, 4)
    torch.testing.assert_close(apply_to_cells(torch.cos, x, index), x.cos() * visible)
    assert torch.equal(apply_to_cells(torch.cos, x, None), x.cos())


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_the_stem_divides_the_resolution_by_its_stride(stride: int) -> None:
    kernel = stem_kernel(stride)
    assert nn.Conv2d(3, 2, kernel, stride, kernel // 2)(torch.zeros(1, 3, 32, 32)).shape[-1] == 32 // stride
    assert kernel > stride, "its windows overlap"
    assert stem_stride(stride * 8, 3) == stride


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residuals": [0, 1]}, r"dims=\[8, 8, 16\] and model.encoder.residuals=\[0, 1\] need one entry per stage"),
        ({"dims": [], "residuals": []}, "need one entry per stage"),
        ({"image_size": 30}, "model.patch_size=8 does not divide dataset.image_size=30; use another image size"),
        ({"image_size": 48, "patch_size": 32}, r"does not divide dataset.image_size=48; use one of \[8, 16\] or another"),
        ({"patch_size": 4}, r"model.patch_size=4: the stages .* 3 times .* such as \[8, 16, 32\]"),
        ({"patch_size": 24, "image_size": 48}, "model.patch_size=24: .* a power of two"),
    ],
)
def test_sizes_that_do_not_fit_get_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_encoder(**options)
