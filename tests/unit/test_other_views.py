"""Levels whose targets lie in other views: the geometry of crops, which cells are predicted, and what trains."""

import pytest
import torch
import torch.nn.functional as F

from hjepa.config.errors import UserError
from hjepa.data.augment import Augment
from hjepa.losses import Contrastive
from hjepa.models.levels import Level, cell_centers
from hjepa.models.predictor import read_cells
from hjepa.models.views import match_levels, place_points, target_views, view_change
from tests.helpers.runs import VIEWS, build_components, trainer

CROPS = ("dataset.views=2", "dataset.local_views=2", "dataset.local_size=16")
SMALL_CONV = "{_target_: hjepa.models.ConvEncoder, _partial_: true, stem: 4, dims: [4, 8, 16], residuals: [0, 0, 1]}"
CONV = ("~model.encoder", f"+model.encoder={SMALL_CONV}", "model.patch_size=8")


def sample_boxes(num_images: int, num_views: int, seed: int = 0) -> torch.Tensor:
    augment = Augment(scale=[0.1, 1.0], ratio=[0.75, 1.33], flip=0.5)
    params = torch.rand(5, num_images * num_views, generator=torch.Generator().manual_seed(seed))
    return augment.boxes(params).unflatten(0, (num_images, num_views))


def read(image: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return the pixel values [3] of an image [3, S, S] at (row, column) from -1 to 1."""
    return F.grid_sample(image[None], place.flip(-1).view(1, 1, 1, 2), padding_mode="border", align_corners=False).view(3)


def test_a_cell_shows_the_same_pixels_in_the_other_view() -> None:
    """Each pixel of the image holds its own coordinates, so that two crops agree exactly where they show the same place."""
    size, augment = 64, Augment(scale=[0.3, 1.0], ratio=[0.75, 1.33], flip=0.5)
    axis = torch.linspace(0, 1, size)
    image = torch.stack([axis.expand(size, size), axis.view(-1, 1).expand(size, size), torch.zeros(size, size)])
    params = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    crops, boxes = augment(image.expand(6, -1, -1, -1), params), augment.boxes(params)
    points, compared = cell_centers(4), 0
    for context in range(6):
        for target in range(6):
            places = place_points(*(boxes[i].view(1, 1, 1, 2, 3) for i in (context, target)), points)[0, 0, 0]
            for place, point in zip(places, points, strict=True):
                if place.abs().max() < 0.95:
                    torch.testing.assert_close(read(crops[context], place), read(crops[target], point), atol=0.01, rtol=0)
                    compared += 1
    assert compared > 200


def test_the_box_of_an_image_that_is_not_cropped_is_the_whole_image() -> None:
    augment = Augment(scale=[1.0, 1.0], ratio=[0.75, 1.33], flip=0.0)
    images, params = torch.rand(4, 3, 8, 8), torch.rand(5, 4)
    assert torch.equal(augment(images, params), images)
    assert torch.equal(augment.boxes(params), torch.eye(2, 3).expand(4, -1, -1))


def test_crops_and_cells_are_interpolated_as_torch_does_with_repeated_borders() -> None:
    torch.manual_seed(0)
    augment, images = Augment(scale=[0.1, 1.0], ratio=[0.5, 2.0], flip=0.5), torch.rand(6, 3, 8, 8)
    params = torch.rand(5, 6)
    grid = F.affine_grid(augment.boxes(params), [6, 3, 8, 8], align_corners=False)
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(augment(images, params), expected)
    places = torch.rand(2, 3, 4, 7, 2) * 2.4 - 1.2
    for side in (4, 20):
        cells = torch.randn(2, 3, side**2, 5)
        maps, points = cells.flatten(0, 1).mT.unflatten(2, (side, side)), places.flatten(0, 1).flip(-1)
        read = F.grid_sample(maps, points, padding_mode="border", align_corners=False).movedim(1, -1).unflatten(0, (2, 3))
        torch.testing.assert_close(read_cells(cells, places), read, atol=1e-5, rtol=1e-5)


def test_crops_of_the_whole_area_are_the_image_or_its_mirror_image() -> None:
    augment = Augment(scale=[1.0, 1.0], ratio=[0.75, 1.33], flip=0.5)
    boxes = augment.boxes(torch.rand(5, 50))
    assert torch.equal(boxes.abs(), torch.eye(2, 3).expand(50, -1, -1))
    assert 0 < (boxes[:, 0, 0] < 0).sum() < 50


def test_places_are_inverse_to_each_other_and_the_same_view_changes_nothing() -> None:
    a, b = (sample_boxes(5, 3, seed).unsqueeze(2) for seed in (0, 1))
    points = cell_centers(4)
    there = place_points(a, b, points)
    back = torch.stack([place_points(b, a, there[i, c, 0])[i, c, 0] for i in range(5) for c in range(3)])
    torch.testing.assert_close(back, points.expand(15, -1, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(place_points(a, a, points), points.expand(5, 3, 1, -1, -1), atol=1e-6, rtol=0)
    assert view_change(a, a).abs().max() < 1e-6
    torch.testing.assert_close(view_change(a, b)[..., :2], -view_change(b, a)[..., :2])


def test_every_context_predicts_all_other_views_and_each_view_is_predicted_equally_often() -> None:
    cpu = torch.device("cpu")
    assert target_views(3, 2, False, cpu).tolist() == [[1, 2], [1, 2], [2, 0], [2, 0], [0, 1], [0, 1]]
    assert target_views(2, 3, True, cpu).tolist() == [[0, 1]] * 3
    assert target_views(1, 2, False, cpu).shape == (2, 0), "a single view has no other"


def test_matches_are_the_cells_nearest_to_the_center_of_the_context() -> None:
    boxes, level = sample_boxes(8, 3), Level("level1", 1, 1, grid=4, dim=2, other=True)
    match = match_levels([level], boxes[:, 1:], boxes[:, :1], target_views(1, 2, True, boxes.device), (2, 4, 4))[0]
    places = place_points(boxes[:, 1:].unsqueeze(2), boxes[:, None, :1].expand(-1, 2, -1, -1, -1), cell_centers(4))
    assert match.cell.shape == (8, 2, 1, 4), "a crop of half the size has a quarter of the cells"
    distance = places.abs().amax(-1)
    torch.testing.assert_close(distance.gather(3, match.cell).sort(-1).values, distance.sort(-1).values[..., :4])
    assert torch.equal(match.inside, distance.gather(3, match.cell) <= 1)
    assert match.inside.float().mean() > 0.9, "hardly any of the nearest cells lies outside"
    rows = match.by_target_view(match.cell)
    assert torch.equal(rows.view(8, 2, 4), match.cell[:, :, 0])


def test_whole_views_are_contrasted_as_in_moco_v3() -> None:
    """The loss of a projected whole view is InfoNCE between the projections of the views, written out."""
    parts = build_components(*VIEWS, "levels.stage=[-1]", "levels.pool=[whole]", "levels.weight=[1.0]", "dataset.views=2")
    model, images = parts.model.eval(), torch.randn(8, 3, 32, 32)
    output = model(images, parts.sampler(8, torch.Generator()), None, sample_boxes(4, 2), 2)
    unit = F.normalize(model.student_heads["level1"](model.student.features(images)), dim=-1).view(4, 2, -1)
    terms = []
    for view in (0, 1):
        similarity = unit[:, 1 - view] @ unit[:, view].T / 0.1  # from each image's other view to this view of all images
        terms.append(F.cross_entropy(similarity, torch.arange(4)))
    torch.testing.assert_close(parts.objective(output)[0], torch.stack(terms).mean())
    assert isinstance(parts.objective.loss, Contrastive)


@pytest.mark.parametrize("model", [(), CONV], ids=["vit", "conv"])
@pytest.mark.parametrize("teacher", ["none", "ema"])
def test_every_part_of_the_student_is_trained(model: tuple[str, ...], teacher: str) -> None:
    t = trainer(*model, *VIEWS, *CROPS, f"teacher={teacher}", "levels.matching.depth=2")
    output = t.model(*t.get_batch(0), 2)
    assert [level.prediction.shape[:2] for level in output.levels] == [(24, 2)] * 2
    loss, terms = t.components.objective(output)
    assert {"level1", "level2"} <= terms.keys()
    loss.backward()
    missing = [n for n, p in t.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    for level in output.levels:
        assert level.target.requires_grad == (teacher == "none")


def test_hidden_cells_and_other_views_can_be_levels_of_one_hierarchy() -> None:
    mixed = ("levels.view=[same,other]", "levels.stage=[-1,-1]", "levels.pool=[1,1]", "levels.predictor=[attention]")
    t = trainer(*VIEWS, *CROPS, *mixed, "levels.project=[false,true]", "masking=multiblock", "+loss@levels.loss.level1=mse")
    output = t.model(*t.get_batch(0), 2)
    hidden, other = output.levels
    assert (hidden.valid, hidden.index) == (None, None)
    assert other.valid is not None
    assert 0.3 < other.valid.float().mean() < 1
    losses = t.components.objective.prediction_loss(output)[1]
    torch.testing.assert_close(losses["level1"], F.mse_loss(hidden.prediction, hidden.target))
    assert t.train_step(t.get_batch(1), 1)["loss"].isfinite()


def test_matching_predictions_are_the_projected_cells_between_which_they_are_interpolated() -> None:
    """With equal boxes, every target cell lies exactly on a cell of the context, whose projection is the prediction."""
    parts = build_components(*VIEWS, "dataset.views=2")
    model, images = parts.model.eval(), torch.randn(4, 3, 32, 32)
    boxes = torch.eye(2, 3).expand(2, 2, 2, 3)
    cells = model(images, parts.sampler(4, torch.Generator()), None, boxes, 2).levels[1]
    stage = model.student(images)[-1].cells.unflatten(0, (2, 2))
    assert cells.index is not None
    for image in range(2):
        for view in range(2):
            expected = model.student_heads["level2"](stage[image, 1 - view])[cells.index[image, view]]
            torch.testing.assert_close(cells.prediction[image, view], expected, atol=1e-5, rtol=1e-4)


def test_a_complete_context_is_encoded_once_if_the_student_is_its_own_teacher() -> None:
    t = trainer(*VIEWS, *CROPS)
    sizes: list[int] = []
    t.model.student.register_forward_hook(lambda _, args, kwargs, out: sizes.append(args[0].shape[-1]), with_kwargs=True)
    t.model(*t.get_batch(0), 2)
    assert sizes == [32, 16], "global crops once, local crops once"


def test_the_teacher_has_the_batch_statistics_of_the_student() -> None:
    t = trainer(*CONV, *VIEWS, *CROPS, "teacher=ema")
    for step in range(2):
        t.train_step(t.get_batch(step), step)
    pairs = zip(t.model.teacher.named_buffers(), t.model.student.buffers(), strict=True)
    for (name, ours), theirs in pairs:
        assert torch.equal(ours, theirs), name


def test_training_can_begin_with_smaller_crops() -> None:
    t = trainer(*CONV, *VIEWS, *CROPS, "dataset.early_size=24", "dataset.early_share=0.5", "train.epochs=null", "train.steps=4")
    assert [t.get_batch(step).global_crops.shape[-1] for step in range(4)] == [24, 24, 32, 32]
    grids = [[level.cells.shape[2] for level in t.model(*t.get_batch(step), 2).levels] for step in (0, 3)]
    assert grids == [[1, 9], [1, 16]]
    assert all(t.train_step(t.get_batch(step), step)["loss"].isfinite() for step in range(4))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.views=2", "dataset.early_size=30"], "dataset.early_size=30 must be a multiple of model.patch_size=4"),
        (["dataset.views=2", "dataset.early_size=36"], "and at most dataset.image_size=32"),
        (
            ["dataset.views=2", "levels.predictor=[attention]", "masking=random", "dataset.early_size=16"],
            "dataset.early_size=16: masks and stacked levels are made for images of dataset.image_size=32 only",
        ),
        (["dataset.views=1"], r"levels.view=\[other\] predicts other views .* set dataset.views=2 or more \(now 1\)"),
        (["dataset.views=2", "masking=random"], r"levels.predictor=\[matching\] reads .* choose masking=none"),
        (["dataset.views=2", "projector=none"], "levels.project=true needs a projector"),
        (["dataset.views=2", "levels.pool=[whole,3]"], r"levels.pool=\['whole', 3\] does not fit the grid of 8x8 of block 2"),
        (
            ["dataset.views=2", "dataset.local_views=1", "dataset.local_size=12", "levels.pool=[whole,2]"],
            "levels.pool=2 does not divide the grid of 3x3 that crops of dataset.local_size=12 have in level2",
        ),
    ],
)
def test_contradicting_options_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_components(*VIEWS, *overrides)


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["loss=mse"], True),
        ([], False),
        (["loss=mse", "teacher=ema"], False),
        (["loss=mse", "regularizer=vicreg"], False),
        (["loss=mse", "+loss@levels.loss.level2=infonce"], False),
    ],
)
def test_a_config_that_must_collapse_is_called_so_at_the_start(
    overrides: list[str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [override.split("=")[0] for override in overrides]
    build_components(*(option for option in VIEWS if option.split("=")[0] not in keys), "dataset.views=2", *overrides)
    assert ("equal features for all images are a perfect solution" in caplog.text) == warned
