"""Every recipe composes, passes the checks, instantiates and takes two steps, the large ones on a small network."""

import json
from pathlib import Path

import pytest

from hjepa.config.run import run
from hjepa.config.schema import check, resolve
from tests.helpers.runs import ROOT, compose
from tests.unit.test_data import make_folder

RECIPES = sorted(p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml"))
OF_EVERY_KIND = ("default", "cifar10_cpu", "ijepa", "reference_step", "smoke")  # the others differ from these in a few values


@pytest.mark.parametrize(
    "recipe", [pytest.param(recipe, marks=[] if recipe in OF_EVERY_KIND else pytest.mark.thorough) for recipe in RECIPES]
)
def test_recipe_takes_two_steps(recipe: str, tmp_path: Path) -> None:
    encoder = compose(f"experiment={recipe}", "dataset=shapes").model.encoder._target_
    debug = "debug=small_vit" if encoder.endswith("ViTEncoder") else "debug=small"
    overrides = [f"experiment={recipe}", debug, "dataset=shapes", "dataset.train=60", "dataset.test=10", "name=r"]
    overrides += ["hardware=cpu", "hardware.threads=1", "tracking=none", f"output_root={tmp_path}"]
    overrides += ["task.steps=2"] if recipe == "reference_step" else []
    run(compose(*overrides))
    (folder,) = tmp_path.glob("*/*r")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] in ("finished", "collapsed")
    assert summary["images_per_second"] > 0
    if recipe != "reference_step":
        assert summary["steps"] == 2


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("recipe", "dataset"),
    [(recipe, "image_folder") for recipe in RECIPES]
    + [(recipe, dataset) for recipe in OF_EVERY_KIND for dataset in ("mixture", "imagenet100", "cifar10")],
)
def test_recipe_fits_every_kind_of_dataset(recipe: str, dataset: str) -> None:
    roots = {"mixture": ["dataset.roots=[a,b]"], "cifar10": []}.get(dataset, ["dataset.root=a"])
    check(resolve(compose(f"experiment={recipe}", f"dataset={dataset}", *roots)))


@pytest.mark.parametrize("recipe", ["smoke", "overfit"])
def test_recipe_runs_on_a_folder_of_images(recipe: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", images=40)
    overrides = [f"experiment={recipe}", "dataset=image_folder", f"dataset.root={root}", "name=r", "model.encoder.depth=1"]
    overrides += ["hardware=cpu", "hardware.threads=1", "tracking=none", f"output_root={tmp_path}", "train.epochs=1"]
    run(compose(*(override for override in overrides if recipe == "overfit" or "depth" not in override)))
    summary = json.loads((tmp_path / recipe / "r" / "summary.json").read_text())
    assert summary["status"] in ("finished", "collapsed")
    assert summary["steps"] == (2 if recipe == "overfit" else 1)


@pytest.mark.parametrize("off", ["probe=none", "regularizer=none"])
def test_a_part_that_a_recipe_configures_can_be_switched_off(off: str, tmp_path: Path) -> None:
    overrides = ["experiment=cjepa", "experiment_name=e", "debug=small_vit", "+probe.every=2", "dataset.train=60", "name=r"]
    overrides += ["hardware=cpu", "hardware.threads=1", "tracking=none", f"output_root={tmp_path}", off]
    run(compose(*(o for o in overrides if off == "probe=none" or not o.startswith("+probe"))))
    assert json.loads((tmp_path / "e" / "r" / "summary.json").read_text())["status"] in ("finished", "collapsed")
