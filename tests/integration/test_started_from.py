"""A run that starts from given weights has two baselines: these weights, and a network with random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hjepa.config.run import run as run_config
from hjepa.config.upgrade import upgrade_summary
from hjepa.tracking.run_folder import read_records, read_summary
from hjepa.training.summary import gains
from tests.helpers.runs import compose, tiny

COMPUTE = ("hardware=cpu", "hardware.threads=1", "tracking=none")
SHORT = ("train.epochs=null", "train.log_every=1", "dataset.train=120", "probe.train_images=60", "probe.penalties=[0.01]")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return the output root of three runs: a source, one that starts from all of it, and one that starts from its encoder."""
    root = tmp_path_factory.mktemp("o")
    source = root / "default" / "source"
    for options in (
        ("name=source", "train.steps=3"),
        ("name=whole", "train.steps=1", f"init_from={source}"),
        ("name=encoder", "train.steps=1", f"model.pretrained={source}", "seed=1"),
    ):
        run_config(compose(f"output_root={root}", *tiny(*SHORT, *options)))
    return root / "default"


@pytest.mark.parametrize("name", ["whole", "encoder"])
def test_the_source_and_random_weights_are_the_baselines(root: Path, name: str) -> None:
    source, summary, (first, *_, last) = read_summary(root / "source"), read_summary(root / name), read_records(root / name)
    assert summary["initial"] == source["probe"]
    assert (summary["untrained"] == source["untrained"]) is (name == "whole"), "the random weights are those of the seed"
    for record in (first, last):
        assert record["initial/linear"] == summary["initial"]["linear"]
        assert record["untrained/linear"] == summary["untrained"]["linear"]
    assert first["probe/linear"] == summary["initial"]["linear"]


def test_collapse_is_judged_against_random_weights(root: Path) -> None:
    source, whole = (torch.load(root / name / "checkpoints" / "latest.pt") for name in ("source", "whole"))
    assert whole["watch"]["untrained_spread"] == source["watch"]["untrained_spread"]
    assert read_records(root / "whole")[0]["teacher/std"] != whole["watch"]["untrained_spread"]["std"]


def test_weights_that_have_collapsed_are_called_so_at_the_start(root: Path, run, tmp_path: Path, caplog) -> None:
    state = torch.load(root / "source" / "checkpoints" / "latest.pt")
    for key, value in state["model"].items():
        if key.endswith("norm.weight"):
            value.zero_()
    torch.save(state, tmp_path / "collapsed.pt")
    run(*SHORT, "train.steps=1", f"init_from={tmp_path}/collapsed.pt", "name=r", "probe.penalties=[1.0]")
    assert "The weights that the run starts from have collapsed (complete collapse" in caplog.text
    assert read_summary(tmp_path / "default" / "r")["status"] == "collapsed"


def test_training_evaluation_and_report_call_them_what_they_are(root: Path, run, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(root / "whole", tmp_path / "whole"))
    source = shutil.copytree(root / "source", tmp_path / "source")
    run(*SHORT, "train.steps=1", f"init_from={root}/source", f"output_root={root.parent}", "name=whole")
    line = next(line for line in capsys.readouterr().out.splitlines() if "k-NN:" in line)
    assert ", the weights it started from " in line
    assert "; a network with random weights " in line
    shutil.rmtree(source)
    options = ("protocol=[knn]", "task.split=validation", "task.train_images=60", "task.checkpoint=latest", "task.depths=[2]")
    run_config(compose("task=evaluate", f"run={folder}", *COMPUTE, *options))
    assert 'Rows "initial" are the weights it started from' in capsys.readouterr().out
    (checkpoint,) = read_summary(folder / "evaluate")["checkpoints"].values()
    rows, summary = checkpoint["results"]["knn"]["rows"], read_summary(folder)
    assert list(rows) == ["trained/block 2", "initial/block 2", "untrained/block 2", "pixels"]
    for kind, key in (("trained", "probe"), ("initial", "initial"), ("untrained", "untrained")):
        assert rows[f"{kind}/block 2"]["part"] == summary[key]["knn"]
    run("task=report", f"run={folder}")
    text = (folder / "report.html").read_text()
    assert "than with the weights it started from" in text.replace("</strong>", "").replace("<strong>", "")
    assert "a network with random weights reaches" in text
    (folder / "checkpoints" / "initial.pt").unlink()  # as in runs of earlier versions
    run_config(compose("task=evaluate", f"run={folder}", *COMPUTE, *options))
    assert "were not kept" in capsys.readouterr().out


def test_summaries_of_earlier_versions_are_read(tmp_path: Path) -> None:
    old = {"probe": {"linear": 0.5}, "untrained": {"linear": 0.4}}
    assert upgrade_summary(old, False) == old | {"initial": {}}
    assert upgrade_summary(old, True) == {"probe": {"linear": 0.5}, "untrained": {}, "initial": {"linear": 0.4}}
    (gain,) = gains(upgrade_summary(old, True))
    assert (gain.baseline, gain.random, gain.baseline_name) == (0.4, None, "the weights it started from")
    (tmp_path / "summary.json").write_text(json.dumps(old))
    (tmp_path / "config.yaml").write_text("init_from: /somewhere\n")
    assert read_summary(tmp_path)["initial"] == {"linear": 0.4}
    (tmp_path / "config.yaml").write_text("teacher: {weights: /somewhere}\n")
    assert read_summary(tmp_path)["initial"] == {"linear": 0.4}


def test_a_run_with_a_frozen_teacher_is_measured_from_random_weights(root: Path, run, tmp_path: Path) -> None:
    run(*SHORT, "train.steps=1", "teacher=frozen", f"teacher.weights={root / 'source'}", "name=r")
    assert not (tmp_path / "default" / "r" / "checkpoints" / "initial.pt").exists()
    assert read_summary(tmp_path / "default" / "r")["initial"] == {}
