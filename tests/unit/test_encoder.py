"""The contract of encoders, checked on every encoder of conf/model and on a hierarchical convolutional one defined here."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.config.instantiate import build
from hjepa.config.targets import USER_TARGETS
from hjepa.models.conv_stem import mask_images
from hjepa.models.encoder import Encoder, Stage
from hjepa.models.layers import gather_tokens
from hjepa.models.vit import ViTEncoder
from tests.helpers.runs import ROOT, build_components, checked_config, trainer


class ConvEncoder(Encoder):
    """Two convolutional stages over images with masked pixels; the first grid is twice as fine as that of the patches."""

    def __init__(self, image_size: int, patch_size: int, dim: int, num_summary_tokens: int = 0) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.num_summary_tokens = image_size, patch_size, 0
        self.layer_dims = (dim, 2 * dim)
        half = patch_size // 2
        self.blocks = nn.ModuleList([nn.Conv2d(3, dim, half, half), nn.Conv2d(dim, 2 * dim, 2, 2)])

    def forward(self, images: Tensor, keep: Tensor | None = None, layers: list[int] | None = None) -> list[Stage]:
        grid, x = images.shape[-1] // self.patch_size, images
        if keep is not None:
            x, keep = mask_images(images, keep, self.patch_size).flatten(0, 1), keep.flatten(0, 1)
        stages = {}
        for layer, (block, finer) in enumerate(zip(self.blocks, (2, 1), strict=True), start=1):
            x = block(x).relu()
            tokens = x.flatten(2).mT
            if keep is not None:  # the finer x finer cells of each patch follow one another
                cells = (
                    x.unflatten(3, (grid, finer)).unflatten(2, (grid, finer)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
                )
                tokens = gather_tokens(cells, keep).unflatten(2, (finer**2, -1)).flatten(1, 2)
            stages[layer] = Stage(tokens, finer * grid, 0)
        return [stages[layer] for layer in layers or [2]]

    def layer_ids(self) -> dict[str, int]:
        return {name: int(name.split(".")[1]) + 1 for name, _ in self.named_parameters()}


CONV = ("~model.encoder", f"+model.encoder={{_target_: {__name__}.ConvEncoder, _partial_: true, dim: 8}}")
ENCODERS = {file.stem: [f"model={file.stem}"] for file in sorted((ROOT / "conf" / "model").glob("*.yaml"))}
ENCODERS |= {
    "stem": ["model.encoder.stem=conv"],
    "learned positions": ["model.encoder.positions=learned"],
    "convolutional": [*CONV],
}


@pytest.fixture(autouse=True)
def allow_conv_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow configs to name the encoder of this file, as a YAML file in a folder of the user does."""
    monkeypatch.setenv(USER_TARGETS, f"{__name__}.ConvEncoder")


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    """Return an encoder for images of 32 pixels and patches of 4 pixels."""
    torch.manual_seed(0)
    constructor = build(checked_config(*ENCODERS[request.param])["model"]["encoder"])
    return constructor(image_size=32, patch_size=4, num_summary_tokens=3).eval()


def test_stages_have_the_declared_sizes(encoder: Encoder) -> None:
    images, layers = torch.randn(2, 3, 32, 32), list(range(1, encoder.num_layers + 1))
    keep = torch.stack([torch.randperm(64)[:20].sort().values for _ in range(6)]).view(2, 3, 20)
    assert encoder.grid == 8
    for stage, kept, dim in zip(encoder(images, layers=layers), encoder(images, keep, layers), encoder.layer_dims, strict=True):
        ratio, remainder = divmod(stage.grid, encoder.grid)
        assert (remainder, kept.grid) == (0, stage.grid)
        assert stage.num_summary == kept.num_summary == encoder.num_summary_tokens
        assert stage.summary.shape == (2, encoder.num_summary_tokens, dim)
        assert stage.cells.shape == (2, stage.grid**2, dim)
        assert kept.cells.shape == (2 * 3, 20 * ratio**2, dim)
    assert stage.grid == encoder.grid, "the last layer has a cell per patch"
    assert torch.equal(encoder(images)[0].tokens, stage.tokens), "the last layer is the default"
    assert encoder(images[:, :, :16, :16])[0].grid == 4, "local crops are smaller"


def test_stages_do_not_depend_on_dropped_patches(encoder: Encoder) -> None:
    images, layers = torch.randn(2, 3, 32, 32), list(range(1, encoder.num_layers + 1))
    keep = torch.stack([torch.randperm(64)[:20].sort().values for _ in range(2)]).view(2, 1, 20)
    other = images + torch.randn(2, 3, 32, 32) * (mask_images(torch.ones(2, 3, 32, 32), keep, 4)[:, 0] == 0)
    for before, after in zip(encoder(images, keep, layers), encoder(other, keep, layers), strict=True):
        torch.testing.assert_close(before.tokens, after.tokens)


def test_all_patches_kept_is_no_mask(encoder: Encoder) -> None:
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images, torch.arange(64).expand(2, 1, 64))[0].tokens, encoder(images)[0].tokens)


def test_every_parameter_belongs_to_a_layer(encoder: Encoder) -> None:
    ids = encoder.layer_ids()
    assert ids.keys() == {name for name, _ in encoder.named_parameters()}
    assert set(range(1, encoder.num_layers + 1)) <= set(ids.values()) <= set(range(encoder.num_layers + 2))


def test_features_are_the_pooled_tokens_of_the_last_layer(encoder: Encoder) -> None:
    images = torch.randn(2, 3, 32, 32)
    stage = encoder(images)[0]
    means = [stage.cells.mean(1), *([stage.summary.mean(1)] if encoder.num_summary_tokens else [])]
    torch.testing.assert_close(encoder.features(images), torch.cat(means, dim=1))
    assert encoder.features(images).shape == (2, encoder.feature_dim)
    encoder.load_state_dict(encoder.adapt_state_dict(encoder.state_dict()))


def test_layers_of_a_vit_are_numbered_as_in_beit() -> None:
    ids = ViTEncoder(image_size=32, patch_size=4, dim=8, depth=12, heads=2, num_summary_tokens=2).layer_ids()
    assert [ids[f"blocks.{i}.attn.qkv.weight"] for i in (0, 11)] == [1, 12]
    assert ids["patch_embed.proj.weight"] == ids["pos_embed"] == ids["reg_token"] == 0
    assert ids["norm.bias"] == 13


@pytest.mark.parametrize(
    "levels", [("levels=flat",), ("levels=depth", "levels.fusion=concat", "regularizer.levels=[1,1]"), ("levels=stacked",)]
)
def test_a_hierarchical_encoder_is_trained_and_probed(levels: tuple[str, ...]) -> None:
    t = trainer(*CONV, *levels, "optimizer.layer_decay=0.5", "schedule.lr.warmup_epochs=0")
    before = t.model.state_dict()["student.blocks.0.weight"].clone()
    for step in range(2):
        assert t.train_step(t.get_batch(step), step)["loss"].isfinite()
    assert not torch.equal(t.model.state_dict()["student.blocks.0.weight"], before)
    scales = {group["scale"] for group in t.components.optimizer.param_groups if group["part"] == "student"}
    assert scales == {0.5, 0.25}
    probe = build(checked_config("probe.validation_images=50")["probe"])
    dataset = t.components.dataset
    scores = probe(t.model.teacher, *probe.select_images(*dataset.train_and_validation()), dataset.normalize)
    assert 0 <= scores["linear"] <= 1


def test_targets_of_a_finer_stage_are_means_over_patches() -> None:
    model = build_components(*CONV, "levels=depth").model
    images = torch.randn(2, 3, 32, 32)
    coarse, fine = model.levels.targets(
        model.teacher_stages(images), [torch.arange(64).view(1, 1, 1, 64).expand(2, -1, -1, -1)] * 2, 8, 2
    )
    cells = F.avg_pool2d(model.teacher.blocks[0](images).relu(), 2).flatten(2).mT
    torch.testing.assert_close(fine[:, 0, 0], F.layer_norm(cells, (8,)))
    assert coarse.shape == (2, 1, 1, 64, 16)


def test_an_encoder_declines_what_it_does_not_have() -> None:
    with pytest.raises(UserError, match=r"levels\.summary_tokens=4: ConvEncoder has no summary tokens"):
        build_components(*CONV, "levels=summary")
    encoder = build_components(*CONV, "levels=flat").model.teacher
    with pytest.raises(UserError, match="ConvEncoder has no attention maps"):
        encoder.attention_blocks(1)
    with pytest.raises(UserError, match="timm has no model that loads the weights of ConvEncoder"):
        encoder.export_spec()
