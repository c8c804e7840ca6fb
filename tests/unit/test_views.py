"""Several views of an image: targets lie in the same global crop, and the regularizer compares all views."""

import pytest
import torch

from hjepa.config.errors import UserError
from tests.helpers.runs import build_components, trainer

MULTICROP = ("dataset.views=2", "dataset.local_views=3", "dataset.local_size=16", "masking.contexts=2")


def test_views_of_an_image_follow_one_another() -> None:
    t = trainer(*MULTICROP, "dataset.augment.flip=0", "dataset.augment.scale=[1,1]")
    images, masks, crops, boxes = t.get_batch(0)
    assert images.shape == (48, 3, 32, 32)
    assert crops.shape == (72, 3, 16, 16)
    assert len(masks.context) == 48
    assert torch.equal(images[0::2], images[1::2]), "the views are equal, because nothing is augmented"
    output = t.model(images, masks, crops, boxes, num_crops=2)
    assert [f.shape for f in output.features] == [(24, 2 * 2 + 3, 64)], "one level is regularized"
    assert output.num_global == 4


def test_crops_of_an_image_that_is_not_augmented_are_normalized_once() -> None:
    t = trainer("dataset.views=1", "dataset.local_views=2", "dataset.augment.flip=0", "dataset.augment.scale=[1,1]")
    images, _, crops, _ = t.get_batch(0)
    for pixels in (images, crops):
        raw = pixels * t.components.dataset.std + t.components.dataset.mean
        assert -1e-5 < raw.min() < raw.max() < 1 + 1e-5
    assert crops.std() > images.std() / 2


def test_features_of_each_view_are_those_of_the_view_alone() -> None:
    t = trainer(*MULTICROP)
    model = t.model.eval()
    images, masks, crops, boxes = t.get_batch(0)
    features = model(images, masks, crops, boxes, num_crops=2).features[0]
    one = model.student.pool_tokens(model.student(images[2:4], keep=masks.context[2:4])[-1])
    local = model.student.pool_tokens(model.student(crops[3:6])[-1])
    assert torch.allclose(features[1], torch.cat([one, local]), atol=1e-5)


def test_views_differ_and_are_reproducible() -> None:
    t = trainer("dataset.views=2")
    images, again = t.get_batch(3)[0], t.get_batch(3)[0]
    assert torch.equal(images, again)
    assert not torch.allclose(images[0], images[1])


def test_two_views_are_predicted_as_two_images() -> None:
    """The targets of a view come from the same view, so that the prediction loss does not depend on the number of views."""
    parts = build_components("dataset.views=2", "regularizer=none")
    images, masks = torch.randn(4, 3, 32, 32), parts.sampler(4, torch.Generator().manual_seed(0))
    loss, _ = parts.objective(parts.model(images, masks, num_crops=2))
    apart, _ = parts.objective(parts.model(images, masks, num_crops=1))
    assert torch.equal(loss, apart)


def test_accumulation_keeps_the_views_of_an_image_together() -> None:
    t = trainer(*MULTICROP, "train.accumulate=4", "regularizer.invariance=1")
    calls = []
    forward = t.model.forward
    t.model.forward = lambda *args: calls.append(args) or forward(*args)
    batch = t.get_batch(0)
    t.train_step(batch, 0)
    assert torch.equal(torch.cat([args[0] for args in calls]), batch.global_crops)
    assert [len(args[0]) for args in calls] == [12] * 4
    assert [len(args[2]) for args in calls] == [18] * 4


def test_the_regularizer_alone_trains_without_predictor_and_targets() -> None:
    t = trainer("levels=none", "masking=none", "regularizer=sigreg", "projector=mlp", "dataset.views=2", "train.batch_size=72")
    assert "predictor" not in t.model.parameter_counts()
    first = [t.train_step(t.get_batch(i), i) for i in range(1, 6)]
    assert set(first[0]) == {"loss", "prediction", "gaussianity", "invariance", "gradient_norm"}
    assert first[-1]["loss"] < first[0]["loss"]


def test_levels_of_one_layer_share_a_projector() -> None:
    same, apart = (
        build_components(f"levels={levels}", "projector=mlp", "regularizer.levels=[1,1]").model for levels in ("pyramid", "depth")
    )
    assert 2 * same.parameter_counts()["projectors"] == apart.parameter_counts()["projectors"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.views=0"], "dataset.views=0"),
        (["dataset.local_views=2", "dataset.local_size=15"], "dataset.local_size=15 must be a multiple of model.patch_size=4"),
        (["dataset.local_views=2", "regularizer=none"], "has an effect only with a regularizer or with levels.view"),
        (["levels=flat", "masking=none"], "masking=none hides nothing that levels.view=\\[same\\] could predict"),
    ],
)
def test_contradicting_options_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_components(*overrides)
