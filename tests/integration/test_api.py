"""The Python API: the same configs, runs and features as on the command line."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError
from PIL import Image

import hjepa
from hjepa.config.run import run as run_config
from hjepa.training.trainer import Trainer
from tests.helpers.runs import ROOT, compose, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hjepa.Run:
    """Train a tiny run."""
    folder = tmp_path_factory.mktemp("api")
    return hjepa.train(
        hjepa.compose(*tiny("levels=summary", "dataset.mean=[0.4,0.5,0.6]"), "overwrite=true", f"output_root={folder}", "name=r")
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of several sizes, modes and formats to nested folders."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i, (mode, size) in enumerate([("RGB", (32, 32)), ("RGB", (60, 40)), ("L", (40, 70)), ("RGBA", (33, 90))]):
        channels = len(mode)
        pixels = rng.integers(256, size=(*size, channels) if channels > 1 else size, dtype=np.uint8)
        (folder / f"{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels, mode).save(folder / f"{i % 2}" / f"{i}.png")
    return folder


def paths(images: Path) -> list[Path]:
    return sorted(images.rglob("*.png"))


# -- compose ---------------------------------------------------------------------------------------------------------------


def test_importing_and_composing_imports_no_torch() -> None:
    code = (
        "import sys, hjepa; assert not {'hydra', 'torch'} & set(sys.modules); hjepa.compose(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), check=True)
    assert {"compose", "load", "train", "__version__"} <= set(hjepa.__all__)


def test_a_composed_config_equals_that_of_the_command_line() -> None:
    overrides = ("experiment=smoke", "optimizer.lr=1e-3", "seed=3")
    ours, theirs = (OmegaConf.to_container(config, resolve=True) for config in (hjepa.compose(*overrides), compose(*overrides)))
    ours["choices"] = theirs["choices"] = None  # of which the command line also records Hydra's own
    assert ours == theirs


def test_options_follow_the_options_that_they_refer_to() -> None:
    config = hjepa.compose()
    config.optimizer.lr, config.dataset.image_size = 0.5, 64
    assert (config.schedule.lr.start, config.model.image_size) == (0.5, 64)
    with pytest.raises(ConfigAttributeError):
        config.train.epoch = 1


def test_mistakes_are_reported_in_one_sentence(tmp_path: Path) -> None:
    for overrides, message in [
        (["modle=x"], "did you mean model"),
        (["model=vit_smal"], "did you mean vit_small"),
        (["train.epochs=0"], "train.epochs=0"),
        (["dataset=image_folder"], "dataset.root has no value"),
        (["+sweeps=seeds"], "A sweep has several configs"),
        (["seed=0,1"], r"^seed=0,1 has several values; call hjepa.compose once for each of them, or write 'seed=\[0,1\]'"),
        (["seed=range(3)"], r"^seed=range\(3\) has several values; call hjepa.compose once for each of them\.$"),
        ([["seed=1"]], r"expected every option as a text of its own.*hjepa.compose\(\*options\)"),
    ]:
        with pytest.raises(hjepa.UserError, match=message) as caught:
            hjepa.compose(*overrides)
        assert "\n" not in str(caught.value)
    with pytest.raises(hjepa.UserError, match="does not exist"):
        hjepa.compose(config_dir=tmp_path / "missing")
    config = hjepa.compose()
    config.train.epochs = "many"
    with pytest.raises(hjepa.UserError, match=r"train.epochs='many'"):
        hjepa.train(config)
    with pytest.raises(hjepa.UserError, match="task is missing"):
        hjepa.train({key: value for key, value in hjepa.compose().items() if key != "task"})
    with pytest.raises(hjepa.UserError, match="task=train"):
        hjepa.train(hjepa.compose("task=sync"))


# -- train -----------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_returned_and_its_config_names_it(run: hjepa.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "train_step", None)  # which would fail
    again = hjepa.train(run.config)
    assert again.folder == run.folder
    assert run.config.train.epochs == 2
    assert run.summary["status"] == "finished"
    assert list(run.metrics.index) == sorted(set(run.metrics.index))
    assert run.metrics["probe/linear"].dropna().iloc[-1] == run.summary["probe"]["linear"]


def test_an_interrupted_run_is_saved_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [override for override in tiny("train.epochs=1") if not override.startswith("probe.")]
    config = hjepa.compose(*overrides, "probe=none", f"output_root={tmp_path}", "name=r")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    loggers = [list(logging.getLogger(name).handlers) for name in ("", "hjepa")]
    step = Trainer.train_step

    def interrupted(self, *arguments):
        if self.completed_steps == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt, match="same call continues"):
            hjepa.train(config)
    assert hjepa.load(tmp_path / "default" / "r").summary["status"] == "stopped"
    assert hjepa.train(config).summary["status"] == "finished"
    assert "resuming at step" in (tmp_path / "default" / "r" / "run.log").read_text()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [list(logging.getLogger(name).handlers) for name in ("", "hjepa")] == loggers


# -- load ------------------------------------------------------------------------------------------------------------------


def test_all_kinds_of_images_have_the_same_features(run: hjepa.Run, images: Path) -> None:
    files = paths(images)
    expected = run.features(files)
    assert expected.shape == (4, run.encoder.feature_dim)
    assert not run.encoder.training
    pictures = [Image.open(file) for file in files]
    transformed = torch.stack([run.transform(picture) for picture in pictures])
    pixels = (transformed * torch.tensor([0.25] * 3).view(3, 1, 1) + torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)).clamp(0, 1)
    for same in (
        run.features([str(file) for file in files], batch_size=3),
        run.features(pictures),
        run.features(transformed, normalized=True),
        run.features(pixels),
        run.features((pixels * 255).round().to(torch.uint8)),
        run.encoder.features(transformed.to(run.device)).detach().cpu(),
    ):
        torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-4)
    frame = run.features(images)
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.index) == [str(file.relative_to(images)) for file in files]
    np.testing.assert_allclose(frame.to_numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_colors_under_transparent_pixels_do_not_change_features(run: hjepa.Run) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 4), dtype=np.uint8)
    pixels[:16, :, 3] = 0
    other = pixels.copy()
    other[:16, :, :3] = 255 - other[:16, :, :3]
    first, second = run.features([Image.fromarray(pixels), Image.fromarray(other)])
    assert torch.equal(first, second)
    with pytest.raises(hjepa.UserError, match="mode F has no fixed range"):
        run.features([Image.new("F", (32, 32))])


def test_features_equal_those_of_the_task(run: hjepa.Run, images: Path, tmp_path: Path) -> None:
    run_config(
        compose("task=features", f"run={run.folder}", f"task.images={images}", f"task.out={tmp_path}/f.npy", "hardware=cpu")
    )
    np.testing.assert_allclose(run.features(images).to_numpy(), np.load(tmp_path / "f.npy"), rtol=1e-4, atol=1e-4)


def test_an_export_has_the_features_of_its_run(run: hjepa.Run, images: Path) -> None:
    run_config(compose("task=export", f"run={run.folder}", "tracking=none"))
    export = hjepa.load(run.folder / "export", device="cpu")
    torch.testing.assert_close(export.features(paths(images)), run.features(paths(images)), rtol=1e-4, atol=1e-4)
    assert export.metrics.empty
    assert export.summary["run"] == run.folder.name
    with pytest.raises(hjepa.UserError, match="no untrained encoder"):
        export.features(images, untrained=True)
    with pytest.raises(hjepa.UserError, match="no checkpoints"):
        hjepa.load(run.folder / "export", checkpoint="latest")


def test_larger_tensors_are_resized_and_cropped_like_files(run: hjepa.Run) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(48, 80, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    torch.testing.assert_close(run.features(pixels), run.features([picture]), rtol=0.02, atol=0.02)  # other rounding of pixels


def test_the_untrained_encoder_has_other_features(run: hjepa.Run) -> None:
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    trained, untrained = run.features(pixels), run.features(pixels, untrained=True)
    assert trained.shape == untrained.shape
    assert not torch.allclose(trained, untrained)


def test_unreadable_images_are_left_out_of_folders_and_refused_in_lists(run: hjepa.Run, images: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"broken")
    with pytest.raises(hjepa.UserError, match=r"no images that can be read: .*broken.png"):
        run.features(tmp_path)
    (tmp_path / "good.png").write_bytes(paths(images)[0].read_bytes())
    with pytest.warns(UserWarning, match=r"1 of 2 images are left out: .*broken.png"):
        assert list(run.features(tmp_path).index) == ["good.png"]
    (tmp_path / "good.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    with pytest.warns(UserWarning, match="are left out"):
        assert list(run.features(tmp_path).index) == [os.fsdecode(b"\xff.png")]
    (tmp_path / os.fsdecode(b"\xff.png")).rename(tmp_path / "good.png")
    with pytest.raises(hjepa.UserError, match=r"1 of 2 images cannot be read: .*broken.png"):
        run.features(sorted(tmp_path.iterdir()))


def test_wrong_arguments_are_refused(run: hjepa.Run, tmp_path: Path) -> None:
    for argument, message in [
        (torch.zeros(3, 32, 32), "expected"),
        (torch.zeros(0, 3, 32, 32), "at least one image"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "torch.int64"),
        (torch.full((1, 3, 32, 32), 255.0), "normalized=True"),
        (torch.full((1, 3, 32, 32), float("nan")), "normalized=True"),
        ([], "expected a tensor"),
        ([1], "expected a tensor"),
        (tmp_path / "missing", "not a folder"),
        (tmp_path, "no images"),
    ]:
        with pytest.raises(hjepa.UserError, match=message):
            run.features(argument)
    for arguments, message in [
        ((tmp_path / "missing",), "does not exist"),
        ((tmp_path,), "neither a run folder nor an export"),
        ((run.folder, "missing"), "no checkpoint"),
        ((run.folder, None, "gpu"), "hardware.device='gpu'"),
    ]:
        with pytest.raises(hjepa.UserError, match=message):
            hjepa.load(*arguments)
