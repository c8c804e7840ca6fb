"""Run folders that version 0.1 wrote can be read, reported and continued.

`tests/fixtures/run_0.1` is the folder of such a run, with the names of classes and options that version 0.2 has renamed.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from hjepa.config.instantiate import build
from hjepa.config.run import run
from hjepa.config.schema import resolve
from hjepa.config.upgrade import RENAMED_SUMMARY_KEYS
from hjepa.tasks.trained_run import load_run
from hjepa.tracking.run_folder import read_summary
from tests.helpers.runs import MASKED, ROOT, compose

FIXTURE = ROOT / "tests" / "fixtures" / "run_0.1"
EARLIER_DEFAULTS = (*MASKED, "optimizer.lr=1.5e-3")
COMPUTE = ("hardware=cpu", "hardware.threads=1", "tracking=none")


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """Return a copy of the run folder where the command of the run expects it."""
    folder = tmp_path / "default" / "run"
    shutil.copytree(FIXTURE, folder)
    return folder


def test_the_probe_scores_of_the_trained_and_the_untrained_encoder_are_reproduced(old_run: Path) -> None:
    opened = load_run(resolve(compose(f"run={old_run}", *COMPUTE)), "latest", None)
    probe, summary = build(opened.config["probe"]), read_summary(old_run)
    train, validation = probe.select_images(*opened.dataset.train_and_validation())
    for encoder, key in ((opened.encoder, "probe"), (opened.untrained, "untrained")):
        scores = probe(encoder, train, validation, opened.dataset.normalize)
        expected = summary[key]
        assert scores.pop("rankme") == pytest.approx(expected.pop("rankme"), rel=1e-3)
        assert scores == pytest.approx(expected, abs=1.01 / len(validation)), "rounding may change the class of one image"


def test_a_report_of_the_run_can_be_written(old_run: Path) -> None:
    run(compose("task=report", f"run={old_run}", *COMPUTE))
    assert "linear" in next(old_run.rglob("*.html")).read_text()


def test_the_run_continues_from_its_checkpoint_and_ends_with_the_same_weights(old_run: Path, tmp_path: Path) -> None:
    command = shlex.split(read_summary(old_run)["command"])
    options = [option for option in command[2:] if not option.startswith(("output_root=", "tracking"))]
    options += [option for option in EARLIER_DEFAULTS if option.split("=")[0] not in {o.split("=")[0] for o in options}]
    (old_run / "summary.json").unlink()
    checkpoints = old_run / "checkpoints"
    shutil.copyfile(checkpoints / "epoch-00001.pt", checkpoints / "latest.pt")
    run(compose(f"output_root={tmp_path}", "tracking=none", *options))
    weights, expected = (
        torch.load(folder / "checkpoints" / "latest.pt", weights_only=True)["model"] for folder in (old_run, FIXTURE)
    )
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[key], expected[key], atol=1e-4) for key in expected)
    assert read_summary(old_run)["status"] == "finished"


def test_renamed_keys_of_a_summary_are_read_under_their_new_names(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(dict.fromkeys(RENAMED_SUMMARY_KEYS, 0.5)))
    assert {"normalised", "utilisation"} <= RENAMED_SUMMARY_KEYS.keys()
    assert read_summary(tmp_path) == dict.fromkeys(RENAMED_SUMMARY_KEYS.values(), 0.5)
