"""Tests of `task=export` and `task=features`: exported encoders and features equal those of the run."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from hjepa.config.errors import UserError
from hjepa.config.run import run as run_config
from hjepa.config.schema import resolve
from hjepa.data.file_lists import walk_images
from hjepa.data.image_files import CorruptFiles, ImageFiles, read_image
from hjepa.data.sources import FilePaths
from hjepa.models.hiera import HieraEncoder
from hjepa.models.pretrained import load_encoder
from hjepa.models.timm_encoder import TimmEncoder
from hjepa.models.vit import ViTEncoder
from hjepa.tasks.export.export import build_summary, preprocessing, relative_difference
from hjepa.tasks.export.features import write_features
from hjepa.tasks.export.formats import FORMATS, ExportedEncoder
from hjepa.tasks.export.readme import render_readme
from hjepa.tasks.export.timm_model import load_timm_model
from hjepa.tasks.export.writers import ROW_GROUP_SIZE, WRITERS, paths_file
from hjepa.tasks.trained_run import TrainedRun, load_run
from hjepa.tracking.atomic import atomic_folder
from hjepa.tracking.run_folder import read_summary
from hjepa.tracking.tracker import register_model
from hjepa.training.signals import StopFlag
from tests.helpers.database import prepare_database
from tests.helpers.runs import compose, tiny

ALL = f"task.formats=[{','.join(FORMATS)}]"
COMMAND = ("hardware=cpu", "hardware.threads=1", "tracking=none")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder of images of several sizes, in one subfolder per class."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(24):
        file = root / f"class{i % 2}" / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize([(16, 16), (20, 16), (40, 50)][i % 3]).save(file)
    return root


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory) -> Path:
    """Return the folder of a run of two steps, whose encoder has summary tokens, LayerScale and stochastic depth."""
    out = tmp_path_factory.mktemp("o")
    options = (
        "dataset=image_folder",
        f"dataset.root={root}",
        "dataset.image_size=16",
        "name=r",
        "train.epochs=null",
        "train.batch_size=8",
    )
    encoder = ("model.encoder.layer_scale=0.5", "model.encoder.drop_path=0.1", "model.encoder.mlp_ratio=3.0")
    run_config(compose(f"output_root={out}", *tiny(*options, *encoder, "train.steps=2")))
    return out / "default" / "r"


def task(name: str, run: Path, *overrides: str) -> None:
    run_config(compose(f"task={name}", f"run={run}", *COMMAND, *overrides))


@pytest.fixture(scope="module")
def opened(trained: Path) -> TrainedRun:
    return load_run(resolve(compose(f"run={trained}", *COMMAND)), None, None)


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    task("export", trained, ALL)
    return trained / "export"


def own_features(run: TrainedRun, paths: list[Path]) -> torch.Tensor:
    """Compute features as the probes do, image by image."""
    pixels = [torch.from_numpy(read_image(str(path), 16)).permute(2, 0, 1) for path in paths]
    with torch.no_grad():
        return torch.cat([run.encoder.features(run.dataset.normalize(image[None])) for image in pixels])


def code_blocks(folder: Path) -> dict[str, str]:
    """Return the code blocks of the README of an export, by their format."""
    return dict(re.findall(r"^## (\S+)\n.*?```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE))


@pytest.mark.thorough
def test_an_export_says_what_becomes_of_transparency(exported: Path) -> None:
    assert json.loads((exported / "preprocess.json").read_text())["background"] == [255, 255, 255]
    assert "transparency composited onto the color [255, 255, 255]" in (exported / "README.md").read_text()


def test_the_code_of_the_readme_computes_the_features_of_the_run(
    exported: Path, opened: TrainedRun, root: Path, monkeypatch
) -> None:
    monkeypatch.chdir(exported)
    paths = sorted(root.rglob("*.png"))[:5]
    expected = own_features(opened, paths)
    code = code_blocks(exported)
    assert len(code) == len(FORMATS)
    scope: dict = {}
    exec(code.pop("timm"), scope)
    images = torch.stack([scope["transform"](Image.open(path)) for path in paths])  # the preprocessing of timm
    with torch.no_grad():
        patches, tokens = scope["model"](images), scope["model"].forward_features(images)
    torch.testing.assert_close(patches, expected[:, : patches.shape[1]], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, :4].mean(1), expected[:, patches.shape[1] :], atol=1e-5, rtol=0)
    for file, block in code.items():
        for count in (5, 1):
            scope = {"images": images[:count]}
            exec(block, scope)
            torch.testing.assert_close(torch.as_tensor(scope["features"]), expected[:count], atol=1e-5, rtol=0, msg=file)
            torch.testing.assert_close(torch.as_tensor(scope["tokens"]), tokens[:count], atol=1e-4, rtol=0, msg=file)


def test_summary_contains_the_comparison(exported: Path, opened: TrainedRun) -> None:
    summary = read_summary(exported)
    assert summary["compared_on"] == "images of the dataset"
    assert summary["checkpoint_hash"] == opened.hash
    assert summary["difference"].keys() == FORMATS.keys()
    assert max(summary["difference"].values()) < 1e-5
    assert not [path for path in exported.parent.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.thorough
def test_encoder_with_conv_stem_and_without_summary_tokens_is_exported(tmp_path: Path, run, monkeypatch) -> None:
    run(
        "levels=flat",
        "name=flat",
        "model.encoder.stem=conv",
        "train.epochs=null",
        "train.steps=1",
        "dataset.train=60",
        "probe.train_images=20",
        "model.encoder.positions=learned",
    )
    flat = tmp_path / "default" / "flat"
    task("export", flat, ALL)
    assert read_summary(flat / "export")["feature_dim"] == 32
    monkeypatch.chdir(flat / "export")
    scope: dict = {}
    exec(code_blocks(flat / "export")["timm"], scope)
    encoder, images = load_run(resolve(compose(f"run={flat}", *COMMAND)), None, None).encoder, torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"](images), encoder.features(images), atol=1e-5, rtol=0)


VIT = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "heads": 2}
HIERA = {"image_size": 16, "patch_size": 4, "dim": 8, "stages": [1, 1]}
EXPORTED = {  # encoders, and the functions that the README defines; without one, the model itself computes the features
    "vit": (lambda: ViTEncoder(**VIT), "model"),
    "vit with summary tokens": (lambda: ViTEncoder(**VIT, num_summary_tokens=2), "tokens"),
    "all blocks": (lambda: every_layer(ViTEncoder(**VIT, num_summary_tokens=2)), "encode"),
    "convolutional stem": (lambda: ViTEncoder(**VIT, stem="conv"), "model"),
    "hiera": (lambda: HieraEncoder(**HIERA), "encode"),
    "all stages": (lambda: every_layer(HieraEncoder(**HIERA)), "encode"),
    "resnet": (lambda: TimmEncoder(32, 32, "test_resnet", {}), "encode"),
    "convnext": (lambda: TimmEncoder(32, 32, "test_convnext.r160_in1k", {"drop_path_rate": 0.1}), "encode"),
}

LOAD_WITHOUT_HJEPA = """
import os, sys, torch
for folder in sys.argv[1:]:
    os.chdir(folder)
    scope = {}
    exec(open("code.py").read(), scope)
    images, model = torch.load("images.pt"), scope["model"]
    with torch.no_grad():
        features, tokens = scope["encode"](images) if "encode" in scope else (model(images), model.forward_features(images))
        torch.save((features, tokens, model(images), scope["transform"].transforms[0].size), "outputs.pt")
assert "hjepa" not in sys.modules
"""


def every_layer(encoder: Any) -> Any:
    encoder.pooled = "all"
    return encoder


@pytest.fixture(scope="module")
def hub_folders(opened: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Return a timm export of every encoder above, whose README has been followed by a process without hjepa, and the encoder."""
    root, folders = tmp_path_factory.mktemp("hub"), {}
    torch.manual_seed(0)
    for name, (create, _) in EXPORTED.items():
        folder, model = root / name, copy.copy(opened.model)
        folder.mkdir()
        model._modules = model._modules | {"teacher": create().eval()}
        run = replace(opened, model=model)
        FORMATS["timm"].export(run, torch.empty(0), folder)
        summary = build_summary(run, {"timm": 0.0}, "random images", folder)
        (folder / "README.md").write_text(render_readme(summary, preprocessing(run), folder, run.encoder))
        (folder / "code.py").write_text(code_blocks(folder)["timm"])
        torch.save(torch.randn(3, 3, run.encoder.image_size, run.encoder.image_size), folder / "images.pt")
        folders[name] = (folder, run.encoder)
    paths = [str(folder) for folder, _ in folders.values()]
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT_HJEPA, *paths], check=True, timeout=300)
    return folders


@pytest.mark.parametrize("name", EXPORTED)
def test_without_hjepa_an_export_computes_the_features_and_tokens_of_the_encoder(
    name: str, hub_folders: dict[str, tuple[Path, Any]]
) -> None:
    folder, encoder = hub_folders[name]
    features, tokens, output, size = torch.load(folder / "outputs.pt")
    with torch.no_grad():
        images = torch.load(folder / "images.pt")
        expected, expected_tokens = encoder.features(images), encoder(images)[-1].tokens
    torch.testing.assert_close(tokens, expected_tokens, atol=1e-5, rtol=1e-4)
    if EXPORTED[name][1] == "tokens":  # the mean patch token, to which the mean summary token has to be added
        features = torch.cat([features, tokens[:, : encoder.num_summary_tokens].mean(1)], dim=1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    text = (folder / "README.md").read_text()
    if EXPORTED[name][1] == "encode":
        same = output.shape == expected.shape and torch.allclose(output, expected, atol=1e-5, rtol=1e-4)
        other = "pools the last layer alone" if encoder.pooled == "all" else "`model(images)` are not the features"
        assert ("`model(images)` are the same features" if same else other) in text
    assert size == encoder.image_size


def test_a_hub_folder_holds_the_weights_once_and_says_nothing_about_those_of_timm(
    hub_folders: dict[str, tuple[Path, Any]],
) -> None:
    for name, (folder, encoder) in hub_folders.items():
        own = {file.name for file in folder.iterdir()} - {"README.md", "code.py", "images.pt", "outputs.pt"}
        head = "---\nlibrary_name: timm\n"
        if name == "convolutional stem":
            assert own == {"model.safetensors", "timm.json"}
            assert not (folder / "README.md").read_text().startswith(head)
            continue
        assert own == {"model.safetensors", "config.json"}
        assert (folder / "README.md").read_text().startswith(head)
        config = json.loads((folder / "config.json").read_text())
        assert not {"license", "tag", "label_names", "hf_hub_id"} & {*config, *config["pretrained_cfg"]}
        assert config["num_features"] == encoder.layer_dims[-1]


def test_a_hub_folder_gets_a_new_classifier(hub_folders: dict[str, tuple[Path, Any]]) -> None:
    for name in ("vit", "hiera", "convnext"):
        folder, encoder = hub_folders[name]
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
        assert model(torch.randn(2, 3, encoder.image_size, encoder.image_size)).shape == (2, 7)
        state = model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


def test_a_hub_folder_starts_another_run(hub_folders: dict[str, tuple[Path, Any]]) -> None:
    folder, encoder = hub_folders["hiera"]
    other = HieraEncoder(**HIERA)
    load_encoder(other, str(folder), "model.pretrained")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in encoder.state_dict().items())


def test_an_export_of_an_earlier_version_is_loaded(hub_folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, encoder = hub_folders["vit"]
    config, images = json.loads((folder / "config.json").read_text()), torch.load(folder / "images.pt")
    overlay = config["pretrained_cfg"] | {"file": "encoder.safetensors"}
    call = {"model_name": config["architecture"], **config["model_args"], "pretrained": True, "pretrained_cfg_overlay": overlay}
    (tmp_path / "timm.json").write_text(json.dumps(call))
    (tmp_path / "encoder.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    model = load_timm_model(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(model.module, images)[0], encoder.features(images), atol=1e-5, rtol=1e-4)


def test_unfaithful_format_is_refused_and_earlier_export_is_kept(exported: Path, trained: Path) -> None:
    before = {file.name: file.read_bytes() for file in exported.iterdir()}
    with pytest.raises(UserError, match=r"timm is not faithful.*nothing is exported"):
        task("export", trained, "task.formats=[torch_export,timm]", "task.tolerance=1e-12")
    assert {file.name: file.read_bytes() for file in exported.iterdir()} == before
    assert not list(trained.glob(".export*"))


def test_comparison_detects_every_kind_of_difference(opened: TrainedRun) -> None:
    images = opened.dataset.normalize(opened.dataset.sample(8))
    own = ExportedEncoder(opened.encoder)
    with torch.no_grad():
        assert relative_difference(own, opened.encoder, images) == 0
        assert relative_difference(ExportedEncoder(opened.untrained), opened.encoder, images) > 1e-5
        assert relative_difference(lambda x: (own(x)[0], own(x)[1] + 1e-3), opened.encoder, images) > 1e-5
        assert relative_difference(lambda x: own(images[:3]), opened.encoder, images) == float("inf")  # a fixed batch size
        assert not relative_difference(lambda x: (own(x)[0] * torch.nan, own(x)[1]), opened.encoder, images) <= 1e9


def test_random_images_are_compared_if_the_dataset_is_missing(trained: Path, root: Path, tmp_path: Path, caplog) -> None:
    run, moved = tmp_path / "r", root.with_name("moved")
    run.mkdir()
    for name in ("config.yaml", "checkpoints"):
        (run / name).symlink_to(trained / name)
    root.rename(moved)
    try:
        task("export", run)
        assert "compared on random images" in caplog.text
        assert read_summary(run / "export")["compared_on"] == "random images"
        task("export", run, f"task.root={moved}")
        assert read_summary(run / "export")["compared_on"] == "images of the dataset"
        with pytest.raises(UserError, match=r"dataset.root: /nowhere is not a folder"):
            task("export", run, "task.root=/nowhere")
    finally:
        moved.rename(root)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.formats=[]", r"task.formats=\[\].*at least one"),
        ("task.formats=onnx", "task.formats='onnx'"),
        ("task.formats=[tflite]", "task.formats.*'tflite'.*onnx"),
        ("task.formats=[torchscript]", "task.formats.*'torchscript'.*torch_export"),
        ("task.tolerance=0.0", r"task.tolerance=0.0: expected PositiveFloat"),
        ("task.checkpoint=epoch-9", "no checkpoint .*epoch-9.pt; this run has .*latest"),
    ],
)
def test_invalid_options_of_export_raise_one_sentence(trained: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        task("export", trained, override)
    assert "\n" not in str(error.value)


def test_missing_package_is_reported_before_any_work(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"task.formats=\[onnx\] needs the package onnxruntime; pip install"):
        task("export", Path("/nowhere"), "task.formats=[onnx]")


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_features_of_every_image_are_written(suffix: str, trained: Path, opened: TrainedRun, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / f"f{suffix}"
    task("features", trained, f"task.images={root}", f"task.out={out}", "task.batch_size=7", "task.workers=0")
    paths, features = load(out)
    assert [root / path for path in paths] == sorted(root.rglob("*.png"))
    torch.testing.assert_close(features, own_features(opened, [root / path for path in paths]), atol=1e-5, rtol=0)
    assert not list(out.parent.glob(".*"))


def load(out: Path) -> tuple[list[str], torch.Tensor]:
    """Read paths and features from a file."""
    if out.suffix == ".npy":
        return os.fsdecode(paths_file(out).read_bytes()).splitlines(), torch.from_numpy(np.load(out))
    table = pq.read_table(out)
    return table["path"].to_pylist(), torch.tensor(table["feature"].to_pylist())


@pytest.mark.parametrize("suffix", WRITERS)
def test_writer_stores_all_appended_rows(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = (1, 0, ROW_GROUP_SIZE + 1, 3000)
    features = rng.standard_normal((sum(sizes), 3)).astype(np.float32)
    paths = [f"b/ä{i}" for i in range(len(features))]
    with WRITERS[suffix](tmp_path / f"f{suffix}", 3) as append:
        done = 0
        for size in sizes:
            append(paths[done : done + size], features[done : done + size])
            done += size
    got_paths, got = load(tmp_path / f"f{suffix}")
    assert got_paths == paths
    assert np.array_equal(got.numpy(), features)


@pytest.fixture
def corrupted(root: Path, tmp_path: Path) -> Path:
    """Return a folder with the images in nested subfolders, one of 24 unreadable, and a text file."""
    folder = tmp_path / "corrupted"
    for path in sorted(root.rglob("*.png")):
        target = folder / "deep" / "er" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "deep" / "er" / "05.png").write_bytes(b"none")
    (folder / "notes.txt").write_text("none")
    return folder


def test_unreadable_images_are_reported_and_left_out(
    corrupted: Path, trained: Path, opened: TrainedRun, tmp_path: Path, caplog
) -> None:
    out = tmp_path / "f.npy"
    task("features", trained, f"task.images={corrupted}", f"task.out={out}", "task.batch_size=4", "task.max_corrupt=0.1")
    assert re.search(r"1 of 24 images cannot be read, they are left out: .*05.png", caplog.text)
    paths, features = load(out)
    assert paths == [f"deep/er/{i:02d}.png" for i in range(24) if i != 5]
    torch.testing.assert_close(features, own_features(opened, [corrupted / path for path in paths]), atol=1e-5, rtol=0)


def test_too_many_unreadable_images_raise_and_keep_the_earlier_file(corrupted: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.npy"
    out.write_text("old")
    with pytest.raises(UserError, match=r"1 of 24 images cannot be read, more than task.max_corrupt=0.01 allows: .*05.png"):
        task("features", trained, f"task.images={corrupted}", f"task.out={out}", "task.workers=0")
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corrupted", "f.npy"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_interrupted_features_leave_no_files(suffix: str, opened: TrainedRun, root: Path, tmp_path: Path) -> None:
    paths = [os.fsencode(path) for path in walk_images(root)]
    files = ImageFiles(FilePaths(np.array(paths)), torch.zeros(24, dtype=torch.int64), 16, CorruptFiles(24, 0.0), 0)
    with pytest.raises(UserError, match="Interrupted after 8 of 24"):
        write_features_interrupted(opened, files, root, tmp_path / f"f{suffix}")
    assert not list(tmp_path.iterdir())


def write_features_interrupted(run: TrainedRun, files: ImageFiles, root: Path, out: Path) -> None:
    """Write features in batches of four and press Ctrl-C after the second one."""
    with StopFlag() as stop, WRITERS[out.suffix](out, 64) as append:
        batches = iter((0, 1))

        def append_and_interrupt(paths: list[str], features: np.ndarray) -> None:
            append(paths, features)
            if next(batches):
                os.kill(os.getpid(), signal.SIGINT)

        write_features(run, files, root, 4, append_and_interrupt, stop)


@pytest.mark.parametrize(
    ("images", "out", "more", "message"),
    [
        ("{root}", "f.csv", (), r"f.csv: unknown kind of file.*\.npy or \.parquet"),
        ("{root}", "class.npy", (), "is a folder; expected the name of a file"),
        ("{root}", "file/f.npy", (), "cannot be written .*set another task.out"),
        ("{tmp}/class.npy", "f.npy", (), "contains no images"),
        ("{tmp}/nowhere", "f.npy", (), "nowhere is not a folder"),
        ("{tmp}/file", "f.npy", (), "file is not a folder"),
        ("{tmp}/lines", "f.npy", (), "contains a line break"),
        ("{root}", "f.npy", ("task.batch_size=0",), "task.batch_size=0: expected PositiveInt"),
        ("{root}", "f.npy", ("task.max_corrupt=2.0",), "task.max_corrupt=2.0: expected Fraction"),
        ("{root}", "f.npy", ("task.checkpoint=epoch-9",), "no checkpoint .*epoch-9.pt"),
    ],
)
def test_invalid_options_of_features_raise_one_sentence(
    images: str, out: str, more: tuple[str, ...], message: str, trained: Path, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "class.npy").mkdir()
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a\nb.png").write_text("")
    with pytest.raises(UserError, match=message) as error:
        task("features", trained, f"task.images={images.format(root=root, tmp=tmp_path)}", f"task.out={tmp_path}/{out}", *more)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["class.npy", "file", "lines"]


def test_atomic_folder_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    for text in ("old", "new"):
        with atomic_folder(folder) as new:
            (new / text).write_text(text)
    assert [path.name for path in folder.iterdir()] == ["new"]
    with pytest.raises(UserError, match="failed"):
        replace_and_fail(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert [path.name for path in folder.iterdir()] == ["new"]


def replace_and_fail(folder: Path) -> None:
    with atomic_folder(folder) as new:
        (new / "partial").write_text("")
        raise UserError("failed")


def test_export_is_logged_to_the_tracker(tmp_path: Path, run, monkeypatch) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    prepare_database(tmp_path)
    run(
        "tracking=mlflow",
        "tracking.mlflow.system_metrics=false",
        "name=t",
        "train.epochs=null",
        "train.steps=1",
        "dataset.train=60",
        "probe.train_images=20",
    )
    folder = tmp_path / "default" / "t"
    run_config(compose("task=export", f"run={folder}", *COMMAND[:2]))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    logged = {Path(file.path).name for file in client.list_artifacts(read_summary(folder)["run_id"], "export")}
    assert logged == {file.name for file in (folder / "export").iterdir()}


# -- models of MLflow ------------------------------------------------------------------------------------------------------


def test_a_registered_encoder_is_loaded_without_hjepa_and_has_the_same_features(
    exported: Path, opened: TrainedRun, tmp_path: Path, monkeypatch
) -> None:
    import mlflow

    prepare_database(tmp_path)
    folder, uri = shutil.copytree(exported.parent, tmp_path / "r"), f"sqlite:///{tmp_path}/mlflow.db"
    tracking = ("tracking=mlflow", f"tracking.mlflow.uri={uri}", f"output_root={tmp_path}")
    run_config(compose("task=sync", f"run={folder}", *tracking))
    config = resolve(compose("task=export", f"run={folder}", *tracking, "tracking.mlflow.register=encoder"))
    assert [register_model(config, folder) for _ in range(2)] == ["models:/encoder/1", "models:/encoder/2"]
    monkeypatch.setitem(sys.modules, "hjepa", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/encoder/2")
    images = opened.dataset.normalize(opened.dataset.sample(3))
    with torch.no_grad():
        expected = opened.encoder.features(images).numpy()
    np.testing.assert_allclose(model.predict(images.numpy())["features"], expected, atol=1e-4)
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 3, 16, 16)
    assert model.metadata.signature.outputs.input_names() == ["features", "tokens"]
    with pytest.raises(Exception, match="shape"):
        model.predict(np.zeros((1, 3, 8, 8), np.float32))


def test_only_an_export_to_onnx_can_be_registered(trained: Path, tmp_path: Path) -> None:
    tracking = ("tracking=mlflow", "tracking.mlflow.register=encoder", f"output_root={tmp_path}")
    with pytest.raises(UserError, match=r"tracking.mlflow.register=encoder registers an ONNX file; set task.formats=\[onnx\]"):
        run_config(compose("task=export", f"run={trained}", *tracking))
    with pytest.raises(UserError, match=r"tracking.mlflow.register belongs to task=export"):
        run_config(compose(*tiny(*tracking)))
    assert not list(tmp_path.iterdir())
