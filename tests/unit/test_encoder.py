"""The contract of encoders, checked on every encoder of conf/model and on one with two stages defined here."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.config.instantiate import build
from hjepa.config.schema import check, resolve
from hjepa.config.targets import USER_TARGETS
from hjepa.models.conv_stem import mask_images
from hjepa.models.encoder import Encoder, Stage
from hjepa.models.layers import gather_tokens
from hjepa.models.maps import cell_index
from hjepa.models.predictor import average_to
from hjepa.models.vit import ViTEncoder
from tests.helpers.runs import ROOT, TINY, build_components, checked_config, compose, trainer


class TwoStages(Encoder):
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

    @property
    def layer_grids(self) -> tuple[int, ...]:
        return (2 * self.grid, self.grid)

    def layer_ids(self) -> dict[str, int]:
        return {name: int(name.split(".")[1]) + 1 for name, _ in self.named_parameters()}


CONV = ("~model.encoder", f"+model.encoder={{_target_: {__name__}.TwoStages, _partial_: true, dim: 8}}")
SMALL = {  # the sizes of small networks that keep the stages of the large ones
    "vit": [o for o in TINY if o.startswith("model.encoder.")],
    "hiera": ["model.encoder.dim=16"],
    "conv": ["model.encoder.stem=8"],
    "timm": [],
}
FILES = sorted(file.stem for file in (ROOT / "conf" / "model").glob("*.yaml") if not file.stem.startswith("_"))
ENCODERS = {name: [f"model={name}", *SMALL[name.partition("_")[0]]] for name in FILES}
ENCODERS |= {
    "stem": ["model=vit_nano", *SMALL["vit"], "model.encoder.stem=conv"],
    "learned positions": ["model=vit_nano", *SMALL["vit"], "model.encoder.positions=learned"],
    "group norm": ["model=conv_nano", "model.encoder.norm=group"],
    "strided stem": ["model=conv_nano", "model.patch_size=32"],
    "layer norm": ["model=timm", "model.encoder.name=convnext_atto"],
    "two stages": [*CONV],
}


@pytest.fixture(autouse=True, scope="module")
def allow_two_stages() -> Iterator[None]:
    """Allow configs to name the encoder of this file, as a YAML file in a folder of the user does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(USER_TARGETS, f"{__name__}.TwoStages")
        yield


@pytest.fixture(params=ENCODERS, scope="module")
def encoder(request: pytest.FixtureRequest) -> Encoder:
    """Return an encoder for images of 4 x 4 patches."""
    torch.manual_seed(0)
    config = resolve(compose(*ENCODERS[request.param]))
    check(config)
    patch_size = config["model"]["patch_size"]
    constructor = build(config["model"]["encoder"])
    return constructor(image_size=4 * patch_size, patch_size=patch_size, num_summary_tokens=3).eval()


def random_images(encoder: Encoder, count: int = 2) -> Tensor:
    return torch.randn(count, 3, encoder.image_size, encoder.image_size)


def random_patches(*shape: int, count: int = 6) -> Tensor:
    """Return sorted indices of `count` of the 4 x 4 patches."""
    return torch.rand(*shape, 16).argsort(-1)[..., :count].sort(-1).values


def test_stages_have_the_declared_sizes(encoder: Encoder) -> None:
    images, layers = random_images(encoder), list(range(1, encoder.num_layers + 1))
    keep = random_patches(2, 3)
    assert encoder.grid == 4
    for stage, kept, dim in zip(encoder(images, layers=layers), encoder(images, keep, layers), encoder.layer_dims, strict=True):
        ratio, remainder = divmod(stage.grid, encoder.grid)
        assert (remainder, kept.grid) == (0, stage.grid)
        assert stage.num_summary == kept.num_summary == encoder.num_summary_tokens
        assert stage.summary.shape == (2, encoder.num_summary_tokens, dim)
        assert stage.cells.shape == (2, stage.grid**2, dim)
        assert kept.cells.shape == (2 * 3, 6 * ratio**2, dim)
    assert tuple(stage.grid for stage in encoder(images, layers=layers)) == encoder.layer_grids
    assert stage.grid == encoder.grid, "the last layer has a cell per patch"
    assert torch.equal(encoder(images)[0].tokens, stage.tokens), "the last layer is the default"
    crops = images[:, :, : encoder.image_size // 2, : encoder.image_size // 2]
    assert encoder(crops)[0].grid == 2, "local crops are smaller"
    assert encoder(crops)[0].cells.shape[1] == 4


def test_the_means_over_patches_are_the_same_for_a_complete_view_and_for_all_patches_as_context(encoder: Encoder) -> None:
    encoder.eval()
    images, layers = random_images(encoder), list(range(1, encoder.num_layers + 1))
    every = torch.arange(16).expand(2, 1, -1)
    for complete, kept in zip(encoder(images, layers=layers), encoder(images, every, layers), strict=True):
        crowded = Stage(kept.tokens, 0, kept.num_summary)  # whose tokens are not in raster order
        torch.testing.assert_close(average_to(complete, 16), average_to(crowded, 16), atol=1e-4, rtol=1e-4)


def test_stages_do_not_depend_on_dropped_patches(encoder: Encoder) -> None:
    images, layers = random_images(encoder), list(range(1, encoder.num_layers + 1))
    keep = random_patches(2, 1)
    hidden = mask_images(torch.ones_like(images), keep, encoder.patch_size)[:, 0] == 0
    other = images + torch.randn_like(images) * hidden
    for before, after in zip(encoder(images, keep, layers), encoder(other, keep, layers), strict=True):
        torch.testing.assert_close(before.tokens, after.tokens)


def test_all_patches_kept_is_no_mask(encoder: Encoder) -> None:
    images, layers = random_images(encoder), list(range(1, encoder.num_layers + 1))
    keep = torch.arange(16).expand(2, 1, 16)
    for kept, full in zip(encoder(images, keep, layers), encoder(images, layers=layers), strict=True):
        index = cell_index(keep[:, 0], encoder.grid, full.grid // encoder.grid)
        torch.testing.assert_close(kept.cells, gather_tokens(full.cells, index), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kept.summary, full.summary)


def test_every_parameter_belongs_to_a_layer(encoder: Encoder) -> None:
    ids = encoder.layer_ids()
    assert ids.keys() == {name for name, _ in encoder.named_parameters()}
    assert set(range(1, encoder.num_layers + 1)) <= set(ids.values()) <= set(range(encoder.num_layers + 2))


def test_features_are_the_pooled_tokens_of_the_last_layer(encoder: Encoder) -> None:
    images = random_images(encoder)
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


@pytest.mark.parametrize(
    "encoder",
    [
        "_target_: hjepa.models.ConvEncoder, stem: 4, dims: [8, 8, 16], residuals: [0, 1, 1]",
        "_target_: hjepa.models.HieraEncoder, dim: 8, stages: [1, 1, 2]",
        "_target_: hjepa.models.TimmEncoder, name: test_convnext, options: {}",
    ],
    ids=["conv", "hiera", "timm"],
)
def test_every_parameter_of_an_encoder_is_trained(encoder: str) -> None:
    size = ("model.patch_size=32", "dataset.image_size=128") if "Timm" in encoder else ("model.patch_size=8",)
    overrides = ("~model.encoder", f"+model.encoder={{{encoder}, _partial_: true}}", *size, "levels=flat", "train.batch_size=4")
    t = trainer(*overrides, "schedule.lr.warmup_epochs=0", "dataset.train=40", "dataset.validation=0.5", "probe.train_images=4")
    before = {name: p.clone() for name, p in t.model.student.named_parameters() if p.requires_grad}
    assert t.train_step(t.get_batch(0), 0)["loss"].isfinite()
    unchanged = [name for name, p in t.model.student.named_parameters() if name in before and torch.equal(p, before[name])]
    assert unchanged == []


def test_cells_of_a_level_are_means_over_cells_of_its_stage() -> None:
    model = build_components(*CONV, "levels=depth", "levels.pool=[1,2]").model
    images = torch.randn(2, 3, 32, 32)
    stages = model.teacher_stages(images)
    coarse, fine = (level.cells(stages[level.layer]) for level in model.levels)
    cells = F.avg_pool2d(model.teacher.blocks[0](images).relu(), 2).flatten(2).mT
    torch.testing.assert_close(fine, cells)
    assert coarse.shape == (2, 64, 16)


def test_an_encoder_declines_what_it_does_not_have() -> None:
    with pytest.raises(UserError, match=r"levels\.summary_tokens=4: TwoStages has no summary tokens"):
        build_components(*CONV, "levels=summary")
    encoder = build_components(*CONV, "levels=flat").model.teacher
    with pytest.raises(UserError, match="TwoStages has no attention maps"):
        encoder.attention_blocks(1)
    with pytest.raises(UserError, match="timm has no model that loads the weights of TwoStages"):
        encoder.export_spec()
