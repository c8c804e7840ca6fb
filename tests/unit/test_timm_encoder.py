"""Models of timm with stages as encoders."""

from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

from hjepa.config.errors import UserError
from hjepa.distributed.batch_norm import synchronize_batch_norms
from hjepa.models.conv_stem import mask_images
from hjepa.models.timm_encoder import TimmEncoder

MODELS = ["resnet18", "convnext_atto", "efficientnet_b0", "regnety_002", "swin_tiny_patch4_window7_224"]
SMALL_SWIN = {"embed_dim": 24, "depths": [1, 1, 2, 1]}
KEEP = torch.tensor([[[0, 3]], [[1, 2]]])  # of 2 x 2 patches


def create(name: str, **options: object) -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder(**({"image_size": 64, "patch_size": 32, "name": name, "options": {}} | options)).eval()


@pytest.fixture(params=MODELS, scope="module")
def encoder(request: pytest.FixtureRequest) -> TimmEncoder:
    return create(request.param)


def test_the_state_dict_is_that_of_timm(encoder: TimmEncoder) -> None:
    model = timm.create_model(**encoder.export_spec())
    model.load_state_dict(encoder.state_dict())
    encoder.load_state_dict(model.state_dict())
    assert [name for name, _ in encoder.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_a_classifier_is_dropped(encoder: TimmEncoder) -> None:
    weights = timm.create_model(**encoder.export_spec() | {"num_classes": 10}).state_dict()
    assert len(weights) == len(encoder.state_dict()) + 2
    encoder.load_state_dict(encoder.adapt_state_dict(weights))


def test_stages_do_not_depend_on_hidden_pixels_and_hidden_cells_are_zero(encoder: TimmEncoder) -> None:
    images, layers = torch.randn(2, 3, 64, 64), list(range(1, encoder.num_layers + 1))
    hidden = mask_images(torch.ones(2, 3, 64, 64), KEEP, 32)[:, 0] == 0
    maps = []
    hooks = [
        encoder.network.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: maps.append(output))
        for name in encoder.stage_names
    ]
    before = encoder(images, KEEP, layers)
    for hook in hooks:
        hook.remove()
    for x in maps:
        cells = x.permute(0, 3, 1, 2) if encoder.stage_names[0] == "layers.0" else x
        assert (cells.unflatten(3, (2, -1)).unflatten(2, (2, -1))[0, :, 0, :, 1] == 0).all()
    for one, other in zip(before, encoder(images + hidden, KEEP, layers), strict=True):
        torch.testing.assert_close(one.tokens, other.tokens)
    assert [stage.cells.shape[-1] for stage in before] == list(encoder.layer_dims)
    assert [stage.grid * reduction for stage, reduction in zip(before, encoder.reductions, strict=True)] == [64] * len(layers)


def test_features_are_those_of_timm_where_no_norm_follows_the_pooling() -> None:
    encoder, images = create("resnet18"), torch.randn(2, 3, 64, 64)
    model = timm.create_model(**encoder.export_spec()).eval()
    model.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder.features(images), model(images))


@pytest.mark.parametrize(("name", "norm"), [("convnext_atto", "head.norm"), ("swin_tiny_patch4_window7_224", "norm")])
def test_the_last_stage_is_normalized(name: str, norm: str) -> None:
    encoder = create(name, options=SMALL_SWIN if norm == "norm" else {})
    tokens = encoder(torch.randn(2, 3, 64, 64))[0].tokens
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 4), atol=1e-4, rtol=0)
    assert encoder.layer_ids()[f"{norm}.weight"] == encoder.num_layers + 1


def test_parameters_that_no_stage_uses_are_frozen() -> None:
    frozen = {name for name, p in create("efficientnet_b0").named_parameters() if not p.requires_grad}
    assert frozen == {"conv_head.weight", "bn2.weight", "bn2.bias"}
    assert all(p.requires_grad for p in create("convnext_atto").parameters())


def test_a_copy_has_parameters_and_masks_of_its_own() -> None:
    encoder, images = create("resnet18"), torch.randn(2, 3, 64, 64)
    copy, before = deepcopy(encoder), encoder(images, KEEP)[0].tokens
    torch.testing.assert_close(copy(images, KEEP)[0].tokens, before)
    with torch.no_grad():
        for p in copy.parameters():
            p.zero_()
    assert not copy(images, KEEP)[0].tokens.any()
    assert torch.equal(encoder(images, KEEP)[0].tokens, before)


def test_the_model_follows_the_encoder() -> None:
    encoder = create("resnet18").double()
    assert encoder(torch.randn(2, 3, 64, 64, dtype=torch.float64))[0].tokens.dtype == torch.float64
    encoder.train()
    assert encoder.network.training
    encoder(torch.randn(2, 3, 64, 64, dtype=torch.float64), KEEP)
    assert encoder.state_dict()["bn1.num_batches_tracked"] == 1, "creating an encoder counts no batch"


def test_layers_are_the_stages() -> None:
    ids = create("efficientnet_b0").layer_ids()
    names = ("conv_stem", "blocks.0.0.conv_dw", "blocks.3.0.conv_dw", "blocks.4.0.conv_dw", "blocks.6.0.conv_dw", "conv_head")
    assert [ids[f"{name}.weight"] for name in names] == [0, 1, 4, 4, 5, 6]
    assert create("resnet18").layer_ids()["conv1.weight"] == 1, "the first stage is the stem"


def test_options_are_those_of_timm() -> None:
    encoder = create("convnext_atto", options={"drop_path_rate": 0.5})
    assert any(getattr(module, "drop_prob", 0) == 0.5 for module in encoder.modules())
    assert not any(isinstance(module, nn.Linear) and module.out_features == 1000 for module in encoder.modules())


def test_networks_whose_stages_are_no_maps_cannot_hide_patches() -> None:
    encoder = create("hiera_tiny_224", patch_size=32)
    assert encoder(torch.zeros(1, 3, 64, 64))[0].tokens.shape == (1, 4, 768)
    with pytest.raises(UserError, match="the outputs of its stages are no maps"):
        encoder.check_masks()
    create("resnet18").check_masks()


def test_hooks_of_stages_that_are_batch_norms_stay_when_these_are_synchronized() -> None:
    encoder = create("mobilenetv3_small_100")
    images, keep = torch.randn(2, 3, 64, 64), torch.tensor([[[0, 3]], [[1, 2]]])
    before = encoder.eval()(images, keep, range(1, encoder.num_layers + 1))
    synchronize_batch_norms(encoder, torch.device("cuda"))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in encoder.modules())
    for old, new in zip(before, encoder(images, keep, range(1, encoder.num_layers + 1)), strict=True):
        assert torch.equal(old.tokens, new.tokens)


def test_local_crops_need_a_model_of_any_image_size() -> None:
    with pytest.raises(UserError, match=r"Crops of 32 pixels .*: swin_tiny_patch4_window7_224 encodes images of 64 pixels only"):
        create("swin_tiny_patch4_window7_224", options=SMALL_SWIN)(torch.randn(2, 3, 32, 32))
    encoder = create("swin_tiny_patch4_window7_224", options=SMALL_SWIN | {"strict_img_size": False})
    assert encoder(torch.randn(2, 3, 32, 32))[0].tokens.shape == (2, 1, 192)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, r"model.encoder.name=resnet19: .* did you mean resnet18"),
        ("no model at all", {}, r"timm.list_models\(\) returns all names"),
        ("vit_tiny_patch16_224", {}, "model.encoder.name=vit_tiny_patch16_224 has no stages"),
        ("mvitv2_tiny", {}, "mvitv2_tiny cannot be used, because it does not return its stages as timm declares them"),
        ("resnet18", {"patch_size": 16}, "a cell of the last stage of resnet18 is 32 pixels wide; set model.patch_size=32"),
        ("resnet18", {"image_size": 48}, "dataset.image_size=48: resnet18 needs a multiple of 32"),
        ("resnet18", {"options": {"drop_pth": 1}}, "model.encoder.options: timm.create_model does not accept them .*drop_pth"),
    ],
)
def test_mistakes_get_one_sentence(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create(name, **options)
