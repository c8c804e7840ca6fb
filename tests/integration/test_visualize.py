"""Tests of `task=visualize`: the computations behind the pictures agree with references, and every kind of run has pictures."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from hjepa.config.errors import UserError
from hjepa.config.run import run
from hjepa.config.schema import resolve
from hjepa.losses import Cosine, Objective
from hjepa.plotting import ColorScale, GridCell, cell_size, image_grid
from hjepa.tasks.trained_run import LayerFeatures, load_run
from hjepa.tasks.visualize.attention import record_attention, rollout
from hjepa.tasks.visualize.neighbors import nearest_neighbors, same_label_fraction
from hjepa.tasks.visualize.pca import pca_colors
from hjepa.tasks.visualize.predictions import LevelSimilarity, level_similarities
from hjepa.tasks.visualize.samples import Samples, select_samples
from hjepa.tasks.visualize.tsne import select_images, tsne
from hjepa.tasks.visualize.views import predicted_levels, similarity_map
from hjepa.tasks.visualize.visualize import PICTURES, available_pictures, picture_names
from hjepa.training.preview import TwoCrops, outline
from tests.helpers.runs import VIEWS, build_components, compose, tiny

COMMAND = ("hardware=cpu", "hardware.threads=1", "tracking=none")
SMALL = ("task.shown=3", "task.searched=24")


def visualize(folder: Path, *overrides: str) -> None:
    run(compose("task=visualize", f"run={folder}", *COMMAND, *SMALL, *overrides))


def train(root: Path, name: str, *overrides: str) -> Path:
    options = tiny(f"name={name}", "train.epochs=null", "train.steps=4", *overrides)
    options = [o for o in options if not (o.startswith("probe.") and "probe=none" in options)]
    run(compose(f"output_root={root}", *options))
    return root / "default" / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return the folder of a run with every kind of layer: two depths, summary tokens and a stacked level."""
    upper = (
        "levels.upper={_target_: hjepa.models.StackedLevel, _partial_: true, pool: 2, dim: 32, depth: 1, heads: 2, weight: 1.0, "
    )
    upper += "detach: true, upper: null, predictor: {_target_: hjepa.models.Predictor, _partial_: true, dim: 32, depth: 1, "
    upper += "heads: 2}, masking: {_target_: hjepa.masking.InverseBlockMasking, _partial_: true, context_scale: [0.3, 0.5], "
    upper += "context_aspect: [0.75, 1.5], contexts: 1}}"
    return train(tmp_path_factory.mktemp("v"), "r", "levels=depth_summary", "dataset.validation=0.4", upper)


@pytest.fixture(scope="module")
def samples(trained: Path, tmp_path_factory) -> Samples:
    run = load_run(resolve(compose(f"run={trained}", *COMMAND)), "latest", None)
    _, validation = run.dataset.train_and_validation()
    return Samples(run, tmp_path_factory.mktemp("pictures"), select_samples(validation, 20), 3)


def test_all_pictures_of_a_run_with_every_kind_of_layer(trained: Path) -> None:
    visualize(trained, "task.searched=80")  # several forward passes
    summary = json.loads((trained / "visualize" / "summary.json").read_text())
    layers = {"block2", "block1", "stacked1"}
    expected = {"curves", "masks", "predictions", "pca", "scatter"}
    expected |= {f"{kind}-{layer}" for kind in ("attention", "neighbors") for layer in layers}
    assert {Path(name).stem for name in summary["pictures"]} == expected
    assert {file.name for file in (trained / "visualize").iterdir()} == {*summary["pictures"], "summary.json"}
    for name in summary["pictures"]:
        with Image.open(trained / "visualize" / name) as image:
            assert min(image.size) > 300, name
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 20, "the picture is blank"


def test_the_same_command_draws_the_same_pictures(trained: Path) -> None:
    names, pixels = ("pca", "predictions"), []
    for _ in range(2):
        visualize(trained, "task.pictures=[pca,predictions]")
        pixels.append([Image.open(trained / "visualize" / f"{name}.png").tobytes() for name in names])
    assert pixels[0] == pixels[1]


@pytest.mark.thorough
def test_run_across_views_has_a_picture_of_views_instead_of_masks(tmp_path: Path) -> None:
    folder = train(tmp_path, "w", *VIEWS, "dataset.views=2", "probe=none")
    assert {file.stem for file in (folder / "plots").glob("*.png")} == {"curves", "views"}
    visualize(folder)
    assert {file.stem for file in (folder / "visualize").glob("*.png")} == PICTURES.keys() - {"masks", "predictions"}
    for name, message in {"masks": "hides no patches", "predictions": "predicts no hidden cells"}.items():
        with pytest.raises(UserError, match=message):
            visualize(folder, f"task.pictures=[{name}]")


def test_a_crop_predicts_itself_perfectly_and_everywhere() -> None:
    """Without augmentation, the two crops of an image are equal, and reading the student's output is the perfect prediction."""
    plain = ("dataset.augment.scale=[1,1]", "dataset.augment.flip=0")
    components = build_components(*VIEWS, "dataset.views=2", *plain)
    components.model.share_teacher()
    images = torch.randint(256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    crops = TwoCrops.sample(components.dataset, images, 0, "test")
    with torch.no_grad():
        levels = predicted_levels(components.model.eval(), components.sampler, crops)
    for level, side in zip(levels, (1, 8), strict=True):
        torch.testing.assert_close(similarity_map(level), torch.ones(3, side, side))


def test_outline_of_a_crop_marks_its_pixels() -> None:
    """An image that is bright inside the outline of a crop, and dark outside, has a bright crop."""
    dataset = build_components(*VIEWS, "dataset.views=2").dataset
    crops = TwoCrops.sample(dataset, torch.zeros(5, 3, 64, 64, dtype=torch.uint8), 0, "test")
    for index, box in enumerate(crops.boxes[:, 0]):
        mark = outline(box, "black")
        columns = [round(64 * edge) for edge in (mark.left, mark.left + mark.width)]
        rows = [round(64 * edge) for edge in (mark.top, mark.top + mark.height)]
        image = torch.zeros(5, 3, 64, 64, dtype=torch.uint8)
        image[index, :, rows[0] : rows[1], columns[0] : columns[1]] = 255
        again = TwoCrops.sample(dataset, image, 0, "test")
        assert again.pixels(index, 0).mean() > 0.95
        assert image[index].float().mean() / 255 < 0.999


@pytest.mark.thorough
def test_run_without_levels_has_all_pictures_except_predictions(tmp_path: Path) -> None:
    folder = train(tmp_path, "l", "levels=none", "masking=none", "dataset.views=2", "probe=none")
    visualize(folder)
    assert {file.stem for file in (folder / "visualize").glob("*.png")} == PICTURES.keys() - {"masks", "views", "predictions"}
    with pytest.raises(UserError, match=r"predicts no hidden cells .*leave predictions out"):
        visualize(folder, "task.pictures=[predictions]")
    with pytest.raises(UserError, match=r"predicts no other views: leave views out"):
        visualize(folder, "task.pictures=[views]")


def test_unlabeled_images_have_neighbors_and_scatter(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i, image in enumerate(torch.randint(256, (60, 32, 32, 3), dtype=torch.uint8).numpy()):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    data = ("dataset=image_folder", f"dataset.root={tmp_path}/images", "dataset.validation=0.4", "train.batch_size=8")
    folder = train(tmp_path, "u", *data, "probe=none", "levels=flat")
    visualize(folder, "task.pictures=[neighbors,scatter]")
    assert {file.stem for file in (folder / "visualize").glob("*.png")} == {"neighbors", "scatter"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.pictures=[pca,umap]"], r"task\.pictures=\['pca', 'umap'\]: expected all, or names among curves,"),
        (["task.pictures=[]"], "expected all, or names"),
        (["task.pictures=3"], r"task\.pictures=3: expected str"),
        (["task.shown=0"], r"task\.shown=0: expected PositiveInt"),
        (["task.searched=1"], r"task\.searched=1: expected at least 2"),
        (["task.checkpoint=epoch-00099"], "no checkpoint"),
        (["run=null"], "needs a run folder"),
        (["task.searched=5", "task.pictures=scatter"], "5 held-out images are too few for scatter"),
    ],
)
def test_invalid_options_raise_one_sentence(trained: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        visualize(trained, *overrides)
    assert "\n" not in str(error.value)


def test_scatter_is_skipped_for_few_images_unless_it_is_requested(samples: Samples, tmp_path: Path) -> None:
    few = Samples(samples.run, tmp_path, samples.split[torch.arange(5)], 3)
    assert available_pictures(["pca", "scatter"], few, skip=True) == ["pca"]
    assert available_pictures(["scatter"], samples, skip=False) == ["scatter"]


def test_equal_features_are_one_point() -> None:
    assert tsne(torch.full((8, 3), 0.1)).unique(dim=0).shape == (1, 2)


# -- Computations ---------------------------------------------------------------------------------------------------------


def test_the_last_block_has_the_features_of_the_probes_and_differs_from_the_untrained_one(samples: Samples) -> None:
    pixels = samples.normalized(samples.shown)
    for kind, encoder in (("trained", samples.run.encoder), ("untrained", samples.run.untrained)):
        assert torch.equal(samples.tokens[kind]["block 2"].pooled, encoder.features(pixels).detach())
        assert torch.equal(samples.features[kind]["block 2"][samples.shown].argmax(1), encoder.features(pixels).argmax(1))
    for layer in samples.layers:
        assert not torch.allclose(samples.tokens["trained"][layer].cells, samples.tokens["untrained"][layer].cells)


def test_recorded_attention_weights_reproduce_the_output_of_the_block(samples: Samples) -> None:
    network = samples.networks["trained"]
    images = samples.normalized(samples.shown)
    before = network.tokens_on_cpu(images)
    for layer in samples.layers:
        blocks, _ = network.blocks(layer)
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        hook = blocks[-1].attn.register_forward_hook(lambda module, args, out, calls=calls: calls.append((args[0], out)))
        with record_attention(blocks) as weights:
            network.tokens_on_cpu(images)
        hook.remove()
        ((x, out),) = calls
        attn = blocks[-1].attn
        value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))[:, :, 2].transpose(1, 2)
        mixed = (weights[-1] @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attn.proj(mixed), out)
        torch.testing.assert_close(weights[-1].sum(-1), torch.ones(weights[-1].shape[:-1]))
        assert len(weights) == len(blocks)
    after = network.tokens_on_cpu(images)
    assert all(torch.equal(before[layer].cells, after[layer].cells) for layer in samples.layers), "recording changes the tokens"
    assert all(block.attn.fused_attn for block in network.encoder.blocks)


def test_rollout_is_the_product_over_blocks() -> None:
    a, b = (torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(2))
    joint = rollout([a, b])
    eye = torch.eye(5)
    torch.testing.assert_close(joint[1], (0.5 * b[1].mean(0) + 0.5 * eye) @ (0.5 * a[1].mean(0) + 0.5 * eye))
    torch.testing.assert_close(joint.sum(-1), torch.ones(2, 5))


def test_pca_colors_agree_with_the_eigenvectors_of_the_covariance() -> None:
    tokens = torch.randn(4, 30, 8) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1, 1])
    colors, explained = pca_colors(tokens)
    centered = tokens.flatten(0, 1) - tokens.flatten(0, 1).mean(0)
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    assert explained == pytest.approx((values[-3:].sum() / values.sum()).item(), abs=1e-5)
    flat = colors.flatten(0, 1)
    for k in range(3):
        component = vectors[:, -1 - k]
        scores = centered @ (component * component[component.abs().argmax()].sign())
        inside = (flat[:, k] > 0) & (flat[:, k] < 1)  # not clipped
        assert torch.corrcoef(torch.stack([flat[inside, k], scores[inside]]))[0, 1] > 0.9999


@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 1, 6), (2, 1, 6)])
def test_pca_colors_of_constant_or_few_tokens_are_finite(shape: tuple[int, ...]) -> None:
    colors, explained = pca_colors(torch.ones(shape))
    assert colors.shape == (*shape[:2], 3)
    assert colors.isfinite().all()
    assert explained == 0


def test_nearest_neighbors_of_pairs_are_each_other() -> None:
    centers = torch.randn(10, 16)
    features = (centers.repeat_interleave(2, 0) + 0.01 * torch.randn(20, 16)) * 7 + 3
    neighbors = nearest_neighbors(features, 3)
    assert neighbors.shape == (20, 3)
    assert torch.equal(neighbors[:, 0], torch.arange(20) ^ 1)
    assert same_label_fraction(neighbors[:, :1], torch.arange(20) // 2) == 1.0
    assert nearest_neighbors(features[:3], 9).shape == (3, 2), "fewer images than neighbors"


def test_similarity_grid_is_the_mean_over_the_predictions_of_every_cell() -> None:
    index = torch.tensor([[[[0, 1]], [[1, 3]]]])
    cosine = torch.tensor([[[[0.2, 0.4]], [[0.8, 1.0]]]])
    similarity = LevelSimilarity(2, index, cosine, cosine)
    torch.testing.assert_close(similarity.grid(None)[0], torch.tensor([[0.2, 0.6], [torch.nan, 1.0]]), equal_nan=True)
    torch.testing.assert_close(similarity.grid(1)[0], torch.tensor([[torch.nan, 0.8], [torch.nan, 1.0]]), equal_nan=True)


def test_every_level_has_similarities_exactly_in_its_predicted_cells(samples: Samples) -> None:
    similarities, masks = level_similarities(samples, samples.shown, "test")
    assert list(similarities) == ["level1", "level2", "summary", "stacked1"]
    for similarity in similarities.values():
        assert (similarity.cosine.abs() <= 1 + 1e-5).all()
        shown = ~similarity.grid(None).isnan().flatten(1)
        assert all(set(shown[i].nonzero().flatten().tolist()) == set(similarity.index[i].flatten().tolist()) for i in range(3))
    seen = masks.context[0, 0]
    assert similarities["level1"].grid(0)[0].flatten()[seen].isnan().all(), "context patches are not predicted"


def test_mean_similarities_agree_with_the_cosine_loss(samples: Samples) -> None:
    similarities, masks = level_similarities(samples, samples.shown, "test")
    with torch.no_grad():
        output = samples.run.model(samples.normalized(samples.shown), masks)
    objective = Objective(Cosine(), None)
    _, terms = objective.prediction_loss(output)
    for name, similarity in similarities.items():
        torch.testing.assert_close(1 - similarity.cosine.mean(), terms[name])
    weighted = sum(level.weight * (1 - similarities[level.name].constant.mean()) for level in output.levels)
    torch.testing.assert_close(weighted, objective.constant_baseline(output))


def test_scatter_shows_at_most_ten_classes() -> None:
    labels = torch.arange(400) % 100
    index, selected = select_images(labels, 400)
    assert len(selected.unique()) == 10
    assert torch.equal(labels[index], selected)


def test_pixels_are_drawn_as_squares_of_equal_size(tmp_path: Path) -> None:
    image = torch.zeros(3, 32, 32)
    image[0, ::2] = 1.0
    rows = [[GridCell(image), GridCell(torch.eye(4), ColorScale("s", 0.0, 1.0))], [GridCell(image), None]]
    image_grid(rows, ["a", "b\nc"], "title", tmp_path / "p.png", "note")
    scale = cell_size(rows) // 32
    with Image.open(tmp_path / "p.png") as picture:
        red = torch.tensor([p[:3] == (255, 0, 0) for p in picture.convert("RGB").getdata()])
    assert int(red.sum()) == 2 * 16 * 32 * scale**2
    assert [file.name for file in tmp_path.iterdir()] == ["p.png"]


def test_names_of_pictures() -> None:
    assert picture_names("all") == list(PICTURES)
    assert picture_names("pca") == ["pca"]
    assert picture_names(["pca", "masks", "pca"]) == ["pca", "masks"]


def test_network_with_one_depth_has_one_layer() -> None:
    components = build_components("levels=flat")
    network = LayerFeatures(components.model.teacher, components.model.upper, components.model.layers)
    assert network.names() == ["block 2"]


def test_class_names_follow_the_labels(tmp_path: Path) -> None:
    for name in ("zebra", "ant"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (16, 16), "red" if name == "ant" else "blue").save(tmp_path / "train" / name / f"{i}.png")
    (tmp_path / "test").mkdir()
    components = build_components(
        "dataset=image_folder", f"dataset.root={tmp_path}", "dataset.image_size=16", "masking=none", "levels=none"
    )
    train_split, _ = components.dataset.train_and_validation()
    names = components.dataset.class_names("class")
    for image, label in zip(train_split.images, train_split.labels["class"], strict=True):
        assert names[label] == ("ant" if image[0, 0, 0] > 128 else "zebra")
