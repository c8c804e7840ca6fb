"""The pictures of a run show what they say: the parts behind them agree with references, and every kind of run has them all."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from hjepa.config.errors import UserError
from hjepa.config.run import run
from hjepa.config.schema import resolve
from hjepa.losses import Cosine
from hjepa.plotting import GridCell, Scale, cell_pixels, image_grid
from hjepa.tasks.trained_run import LayerFeatures, load_run
from hjepa.tasks.visualize.attention import recorded, rollout
from hjepa.tasks.visualize.neighbors import nearest, same_class
from hjepa.tasks.visualize.pca import pca_colors
from hjepa.tasks.visualize.predictions import LevelSimilarity, guess
from hjepa.tasks.visualize.samples import Samples, some
from hjepa.tasks.visualize.tsne import chosen
from hjepa.tasks.visualize.visualize import PICTURES, wanted_pictures
from tests.helpers.runs import build_components, compose, tiny

HERE = ("hardware=cpu", "hardware.threads=1", "tracking=none")
SMALL = ("task.shown=3", "task.searched=24")


def visualize(folder: Path, *overrides: str) -> None:
    run(compose("task=visualize", f"run={folder}", *HERE, *SMALL, *overrides))


def train(root: Path, name: str, *overrides: str) -> Path:
    options = tiny(f"name={name}", "train.epochs=null", "train.steps=4", *overrides)
    options = [o for o in options if not (o.startswith("probe.") and "probe=none" in options)]
    run(compose(f"output_root={root}", *options))
    return root / "default" / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with two depths, summary tokens and a stacked level: everything that can be looked at."""
    more = (
        "levels.upper={_target_: hjepa.models.StackedLevel, _partial_: true, pool: 2, dim: 32, depth: 1, heads: 2, weight: 1.0, "
    )
    more += "detach: true, upper: null, predictor: {_target_: hjepa.models.Predictor, _partial_: true, dim: 32, depth: 1, "
    more += "heads: 2}, masking: {_target_: hjepa.masking.InverseBlockMasking, _partial_: true, context_scale: [0.3, 0.5], "
    more += "context_aspect: [0.75, 1.5], contexts: 1}}"
    return train(tmp_path_factory.mktemp("v"), "r", "levels=depth_summary", "dataset.validation=0.4", more)


@pytest.fixture(scope="module")
def scene(trained: Path, tmp_path_factory) -> Samples:
    opened = load_run(resolve(compose(f"run={trained}", *HERE)), "latest", None)
    _, validation = opened.dataset.train_and_validation()
    return Samples(opened, tmp_path_factory.mktemp("scene"), some(validation, 20), 3)


def test_all_pictures_of_a_run_with_every_kind_of_level(trained: Path) -> None:
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
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 20, "a picture is not blank"


def test_the_same_command_draws_the_same_pictures(trained: Path) -> None:
    names, pixels = ("pca", "predictions"), []
    for _ in range(2):
        visualize(trained, "task.pictures=[pca,predictions]")
        pixels.append([Image.open(trained / "visualize" / f"{name}.png").tobytes() for name in names])
    assert pixels[0] == pixels[1]


def test_a_run_without_levels_has_all_pictures_but_predictions(tmp_path: Path) -> None:
    folder = train(tmp_path, "l", "levels=none", "masking=none", "dataset.views=2", "probe=none")
    visualize(folder)
    assert {file.stem for file in (folder / "visualize").glob("*.png")} == PICTURES.keys() - {"predictions"}
    with pytest.raises(UserError, match=r"predicts nothing .*leave predictions out"):
        visualize(folder, "task.pictures=[predictions]")


def test_images_without_labels_are_shown_without_classes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i, image in enumerate(torch.randint(256, (60, 32, 32, 3), dtype=torch.uint8).numpy()):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    data = ("dataset=image_folder", f"dataset.root={tmp_path}/images", "dataset.validation=0.4", "train.batch_size=8")
    folder = train(tmp_path, "u", *data, "probe=none", "levels=flat")
    visualize(folder, "task.pictures=[neighbors,scatter]")
    assert {file.stem for file in (folder / "visualize").glob("*.png")} == {"neighbors", "scatter"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.pictures=[pca,umap]"], r"task\.pictures=\['pca', 'umap'\]: expected all, or names among curves,"),
        (["task.pictures=[]"], "expected all, or names"),
        (["task.pictures=3"], r"task\.pictures=3: expected str"),
        (["task.shown=0"], r"task\.shown=0: expected at least 1"),
        (["task.searched=1"], r"task\.searched=1: expected at least 2"),
        (["task.checkpoint=epoch-00099"], "no checkpoint"),
        (["run=null"], "needs a run folder"),
        (["task.searched=5", "task.pictures=scatter"], "5 held-out images are too few for scatter"),
    ],
)
def test_mistakes_are_told_in_one_sentence(trained: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        visualize(trained, *overrides)
    assert "\n" not in str(error.value)


# -- the parts -------------------------------------------------------------------------------------------------------------


def test_the_deepest_layer_is_what_the_probes_see_and_the_untrained_one_is_not_it(scene: Samples) -> None:
    pixels = scene.normalized(scene.rows)
    for kind, encoder in (("trained", scene.run.encoder), ("untrained", scene.run.untrained)):
        assert torch.equal(scene.tokens[kind]["block 2"].pooled, encoder.features(pixels).detach())
        assert torch.equal(scene.features[kind]["block 2"][scene.rows].argmax(1), encoder.features(pixels).argmax(1))
    for layer in scene.layers:
        assert not torch.allclose(scene.tokens["trained"][layer].cells, scene.tokens["untrained"][layer].cells)


def test_recorded_attention_is_that_which_was_computed(scene: Samples) -> None:
    network = scene.layer_features["trained"]
    images = scene.normalized(scene.rows)
    before = network.tokens_on_cpu(images)
    for layer in scene.layers:
        blocks, _ = network.blocks(layer)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        hook = blocks[-1].attn.register_forward_hook(lambda module, given, out, seen=seen: seen.append((given[0], out)))
        with recorded(blocks) as weights:
            network.tokens_on_cpu(images)
        hook.remove()
        ((given, out),) = seen
        attn = blocks[-1].attn
        value = attn.qkv(given).unflatten(-1, (3, attn.num_heads, -1))[:, :, 2].transpose(1, 2)
        mixed = (weights[-1] @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attn.proj(mixed), out)
        torch.testing.assert_close(weights[-1].sum(-1), torch.ones(weights[-1].shape[:-1]))
        assert len(weights) == len(blocks)
    after = network.tokens_on_cpu(images)
    assert all(torch.equal(before[layer].cells, after[layer].cells) for layer in scene.layers), "looking changes nothing"
    assert all(block.attn.fused_attn for block in network.encoder.blocks)


def test_rollout_is_the_product_over_blocks() -> None:
    a, b = (torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(2))
    joint = rollout([a, b])
    eye = torch.eye(5)
    torch.testing.assert_close(joint[1], (0.5 * b[1].mean(0) + 0.5 * eye) @ (0.5 * a[1].mean(0) + 0.5 * eye))
    torch.testing.assert_close(joint.sum(-1), torch.ones(2, 5))


def test_components_agree_with_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    tokens = torch.randn(4, 30, 8) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1, 1])
    colors, share = pca_colors(tokens)
    reference = PCA(3).fit(tokens.flatten(0, 1).numpy())
    scores = torch.from_numpy(reference.transform(tokens.flatten(0, 1).numpy()))
    assert share == pytest.approx(reference.explained_variance_ratio_.sum(), abs=1e-5)
    inside = colors.flatten(0, 1)
    for k in range(3):
        free = (inside[:, k] > 0) & (inside[:, k] < 1)  # not clipped
        assert abs(torch.corrcoef(torch.stack([inside[free, k], scores[free, k]]))[0, 1]) > 0.9999
    constant, nothing = pca_colors(torch.ones(2, 4, 6))
    assert constant.isfinite().all()
    assert nothing == 0


def test_nearest_neighbors_of_pairs_are_each_other() -> None:
    centers = torch.randn(10, 16)
    features = (centers.repeat_interleave(2, 0) + 0.01 * torch.randn(20, 16)) * 7 + 3
    found = nearest(features, 3)
    assert found.shape == (20, 3)
    assert torch.equal(found[:, 0], torch.arange(20) ^ 1)
    assert same_class(found[:, :1], torch.arange(20) // 2) == 1.0
    assert nearest(features[:3], 9).shape == (3, 2), "all others, where there are few"


def test_a_similarity_grid_is_the_mean_of_every_cells_predictions() -> None:
    index = torch.tensor([[[[0, 1]], [[1, 3]]]])
    cosine = torch.tensor([[[[0.2, 0.4]], [[0.8, 1.0]]]])
    guessed = LevelSimilarity(2, index, cosine, cosine)
    torch.testing.assert_close(guessed.grid(None)[0], torch.tensor([[0.2, 0.6], [torch.nan, 1.0]]), equal_nan=True)
    torch.testing.assert_close(guessed.grid(1)[0], torch.tensor([[torch.nan, 0.8], [torch.nan, 1.0]]), equal_nan=True)


def test_every_level_is_compared_on_its_own_cells_and_only_on_predicted_ones(scene: Samples) -> None:
    guesses, masks = guess(scene, scene.rows, "test")
    assert list(guesses) == ["level1", "level2", "summary", "stacked1"]
    for guessed in guesses.values():
        assert (guessed.cosine.abs() <= 1 + 1e-5).all()
        shown = ~guessed.grid(None).isnan().flatten(1)
        assert all(set(shown[i].nonzero().flatten().tolist()) == set(guessed.index[i].flatten().tolist()) for i in range(3))
    seen = masks.context[0, 0]
    assert guesses["level1"].grid(0)[0].flatten()[seen].isnan().all(), "what is seen is not predicted"


def test_similarities_are_what_the_cosine_loss_is_a_mean_of(scene: Samples) -> None:
    guesses, masks = guess(scene, scene.rows, "test")
    with torch.no_grad():
        output = scene.run.model(scene.normalized(scene.rows), masks)
    loss = Cosine()
    _, terms = loss(output)
    for name, guessed in guesses.items():
        torch.testing.assert_close(1 - guessed.cosine.mean(), terms[name])
    weighed = sum(level.weight * (1 - guesses[level.name].constant.mean()) for level in output.levels)
    torch.testing.assert_close(weighed, loss.constant(output))


def test_many_classes_are_thinned_to_those_that_colors_can_tell_apart() -> None:
    label = torch.arange(400) % 100
    keep, shown = chosen(label, 400)
    assert len(shown.unique()) == 10
    assert torch.equal(label[keep], shown)


def test_pixels_are_drawn_as_whole_squares(tmp_path: Path) -> None:
    image = torch.zeros(3, 32, 32)
    image[0, ::2] = 1.0
    rows = [[GridCell(image), GridCell(torch.eye(4), Scale("s", 0.0, 1.0))], [GridCell(image), None]]
    image_grid(rows, ["a", "b\nc"], "title", tmp_path / "p.png", "note")
    scale = cell_pixels(rows) // 32
    with Image.open(tmp_path / "p.png") as picture:
        red = torch.tensor([p[:3] == (255, 0, 0) for p in picture.convert("RGB").getdata()])
    assert int(red.sum()) == 2 * 16 * 32 * scale**2
    assert [file.name for file in tmp_path.iterdir()] == ["p.png"]


def test_picture_names() -> None:
    assert wanted_pictures("all") == list(PICTURES)
    assert wanted_pictures("pca") == ["pca"]
    assert wanted_pictures(["pca", "masks", "pca"]) == ["pca", "masks"]


def test_a_network_of_one_depth_has_one_layer() -> None:
    parts = build_components("levels=flat")
    network = LayerFeatures(parts.model.teacher, parts.model.upper, parts.model.depths)
    assert network.names() == ["block 2"]


def test_class_names_follow_the_labels(tmp_path: Path) -> None:
    for name in ("zebra", "ant"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (16, 16), "red" if name == "ant" else "blue").save(tmp_path / "train" / name / f"{i}.png")
    (tmp_path / "test").mkdir()
    dataset = build_components(
        "dataset=image_folder", f"dataset.root={tmp_path}", "dataset.image_size=16", "masking=none", "levels=none"
    )
    train_part, _ = dataset.dataset.train_and_validation()
    names = dataset.dataset.class_names("class")
    for image, label in zip(train_part.images, train_part.labels["class"], strict=True):
        assert names[label] == ("ant" if image[0, 0, 0] > 128 else "zebra")
