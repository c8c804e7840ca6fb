"""Features of the last layer and of all layers: what they are, and that everything that reads features follows the option."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hjepa.config.errors import UserError
from hjepa.config.targets import USER_TARGETS
from hjepa.config.upgrade import upgrade_config
from hjepa.models.encoder import Encoder, Stage
from hjepa.models.hiera import HieraEncoder
from hjepa.models.layers import patchify
from hjepa.models.timm_encoder import TimmEncoder
from hjepa.models.vit import ViTEncoder
from hjepa.tasks.evaluate.finetune import Classifier
from hjepa.tasks.evaluate.protocol import EvalOptions
from hjepa.tasks.export.formats import ExportedEncoder, Timm
from hjepa.tasks.export.readme import timm_section
from hjepa.tasks.trained_run import LayerFeatures, LayerTokens
from tests.helpers.runs import build_components


class TwoStages(Encoder):
    """Two convolutional stages; the grid of the first one is twice as fine as that of the patches. Masks are not supported."""

    def __init__(self, image_size: int, patch_size: int, num_summary_tokens: int = 0) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.num_summary_tokens = image_size, patch_size, 0
        self.layer_dims = (8, 16)
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, patch_size // 2, patch_size // 2), nn.Conv2d(8, 16, 2, 2)])

    def forward(self, images: Tensor, keep: Tensor | None = None, layers: list[int] | None = None) -> list[Stage]:
        first = self.blocks[0](images).relu()
        stages = [Stage(x.flatten(2).mT, x.shape[-1], 0) for x in (first, self.blocks[1](first).relu())]
        return [stages[layer - 1] for layer in layers or [2]]

    def layer_ids(self) -> dict[str, int]:
        return {name: int(name.split(".")[1]) + 1 for name, _ in self.named_parameters()}


def vit(num_summary_tokens: int) -> ViTEncoder:
    return ViTEncoder(image_size=32, patch_size=8, dim=16, depth=3, heads=2, num_summary_tokens=num_summary_tokens)


def hiera() -> HieraEncoder:
    return HieraEncoder(image_size=32, patch_size=8, dim=8, stages=[1, 1, 1])


def from_timm(name: str) -> TimmEncoder:
    return TimmEncoder(image_size=32, patch_size=32, name=name, options={})


IN_TIMM: dict[str, Callable[[], Encoder]] = {
    "ViT": lambda: vit(0),
    "ViT with summary tokens": lambda: vit(3),
    "Hiera": hiera,
    **{name: partial(from_timm, name) for name in ("test_resnet", "test_convnext", "test_efficientnet")},
}
ENCODERS = IN_TIMM | {"stages": lambda: TwoStages(32, 8)}


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    torch.manual_seed(0)
    return ENCODERS[request.param]().eval().requires_grad_(False)


def images() -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def layer_means(encoder: Encoder, layer: int) -> Tensor:
    """Compute the pooled tokens of a layer without the methods of the encoder."""
    (stage,) = encoder(images(), layers=[layer])
    count = encoder.num_summary_tokens
    parts = [stage.tokens[:, count:], *([stage.tokens[:, :count]] if count else [])]
    return torch.cat([part.mean(1) for part in parts], dim=1)


def test_features_of_all_layers_are_side_by_side_from_the_first_to_the_last(encoder: Encoder) -> None:
    last = encoder.features(images())
    encoder.pooled = "all"
    features = encoder.features(images())
    means = [layer_means(encoder, layer) for layer in range(1, encoder.num_layers + 1)]
    torch.testing.assert_close(features, torch.cat(means, dim=1))
    torch.testing.assert_close(features[:, -encoder.feature_dims[-1] :], last)
    assert features.shape == (5, encoder.feature_dim)
    assert encoder.feature_dim == sum(encoder.feature_dims)


@pytest.mark.parametrize("pooled", ["last", "all"])
def test_exported_features_are_those_of_the_encoder(encoder: Encoder, pooled: str) -> None:
    encoder.pooled = pooled
    features, tokens = ExportedEncoder(encoder)(images())
    torch.testing.assert_close(features, encoder.features(images()))
    torch.testing.assert_close(tokens, encoder(images())[-1].tokens)


@pytest.mark.parametrize("pooled", ["last", "all"])
@pytest.mark.parametrize("name", IN_TIMM)
@torch.no_grad()
def test_timm_computes_the_features_by_the_code_of_the_readme(
    name: str, pooled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    encoder = IN_TIMM[name]().eval()
    encoder.pooled = pooled
    expected = (encoder.features(images()), encoder(images())[-1].tokens)
    run = SimpleNamespace(encoder=encoder, config={"dataset": {"mean": [0.5] * 3, "std": [0.2] * 3}})
    Timm().export(run, images(), tmp_path)
    torch.testing.assert_close(Timm().load(tmp_path)(images()), expected, atol=1e-5, rtol=1e-5)
    counts = {"summary": encoder.num_summary_tokens, "patches": encoder.grid**2, "dim": encoder.layer_dims[-1]}
    scope: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(timm_section(tmp_path, counts, encoder.image_size).partition("```python\n")[2].partition("```")[0], scope)
    if "encode" in scope:
        torch.testing.assert_close(scope["encode"](images()), expected, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(scope["model"](images()), expected[0][:, : counts["dim"]], atol=1e-5, rtol=1e-5)


def test_the_classifier_of_fine_tuning_reads_all_features(encoder: Encoder) -> None:
    encoder.pooled = "all"
    logits = Classifier(encoder, {"class": 4})(images())["class"]
    logits.sum().backward()
    assert logits.shape == (5, 4)


def test_the_option_of_the_model_reaches_student_and_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_TARGETS, f"{__name__}.TwoStages")
    own = ("~model.encoder", f"+model.encoder={{_target_: {__name__}.TwoStages, _partial_: true}}", "levels=flat")
    model = build_components(*own, "model.features=all").model
    assert model.teacher.feature_dim == model.student.feature_dim == 8 + 16
    assert build_components(*own).model.teacher.feature_dim == 16


def test_configs_of_earlier_runs_mean_the_last_layer() -> None:
    assert upgrade_config({"model": {"patch_size": 4}})["model"]["features"] == "last"
    assert upgrade_config({"model": {"features": "all"}})["model"]["features"] == "all"
    assert upgrade_config({"seed": 0}) == {"seed": 0, "choices": {}}


# -- Layers of a run -------------------------------------------------------------------------------------------------------


def test_layers_are_named_by_the_encoder() -> None:
    assert LayerFeatures(vit(0), None, [1, 3]).names() == ["block 3", "block 1"]
    assert LayerFeatures(TwoStages(32, 8), None, [1, 2]).names() == ["stage 2", "stage 1"]


@pytest.mark.parametrize("depths", [[1], []])
def test_features_of_all_layers_are_the_first_of_the_layers(encoder: Encoder, depths: list[int]) -> None:
    encoder.pooled = "all"
    depths = [*depths, encoder.num_layers]
    layers = LayerFeatures(encoder, None, depths)
    features = layers.features(images())
    assert list(features) == layers.names() == [f"all {encoder.layer_name}s", *layers.single_names()]
    torch.testing.assert_close(features[layers.names()[0]], encoder.features(images()))
    for name, depth in zip(layers.single_names(), reversed(depths), strict=True):
        torch.testing.assert_close(features[name], layer_means(encoder, depth))


def test_tokens_of_all_layers_are_averaged_to_the_grid_of_the_patches() -> None:
    encoder = TwoStages(32, 8).eval()
    encoder.pooled = "all"
    tokens = LayerFeatures(encoder, None, [1, 2]).tokens(images())
    first, second = (tokens[f"stage {number}"] for number in (1, 2))
    assert (first.grid, second.grid, tokens["all stages"].grid) == (8, 4, 4)
    patches = F.avg_pool2d(first.cells.mT.unflatten(2, (8, 8)), 2).flatten(2).mT
    torch.testing.assert_close(first.cells_on(4), patches)
    torch.testing.assert_close(tokens["all stages"].cells, torch.cat([patches, second.cells], dim=2))
    moved = tokens["all stages"].cpu()
    assert torch.equal(moved.cells, tokens["all stages"].cells)
    assert moved.grid == 4


def test_a_patch_of_a_finer_stage_has_the_place_of_the_patch() -> None:
    """The labels of the dense probe are in the order of `patchify`, so the averages of finer cells must be as well."""
    image = torch.arange(16.0).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    labels = patchify(image.expand(1, 1, -1, -1), 8).mean(2)
    finer = F.avg_pool2d(image[None, None], 4).flatten(2).mT
    tokens = LayerTokens([Stage(finer, 8, 0)], finer.mean(1))
    assert torch.equal(tokens.cells_on(4)[..., 0], labels)
    assert torch.equal(labels, torch.arange(16.0)[None])


def test_refused_depths_are_counted_in_layers_of_the_encoder() -> None:
    options = EvalOptions(None, None, "test", None, None, None, depths=[3])
    run = SimpleNamespace(encoder=TwoStages(32, 8), folder=Path("r"))
    with pytest.raises(UserError, match=r"task\.depths=\[3\]: the encoder of r has 2 stages; expected numbers from 1 to 2"):
        options.depths_of(run)
    assert EvalOptions(None, None, "test", None, None, None, depths=[1]).depths_of(run) == [1, 2]
