"""Classes and YAML files in folders of the user, those of docs/extending.md, extend every part without a fork."""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.helpers.children import launch
from tests.helpers.docs import example_files

FILES = example_files() | {
    "lab/__init__.py": "",
    "lab/broken.py": "import a_package_that_is_not_installed\n\n\nclass Loss:\n    pass\n",
    "conf/loss/missing.yaml": "_target_: labs.losses.Huber\n",
    "conf/loss/unnamed.yaml": "_target_: lab.losses.Hubert\n",
    "conf/loss/broken.yaml": "_target_: lab.broken.Loss\n",
}

RECIPE = ("experiment=ijepa", "experiment_name=default", "masking=checkerboard", "loss=huber", "dataset=noise")
OWN = (*RECIPE, "model=patch_mlp", "levels=pyramid")
COMPUTE = ("tracking=none", "hardware=cpu", "hardware.threads=1", "output_root=out")
SHORT = ("train.epochs=null", "train.steps=2", "train.batch_size=8", "probe=none", *COMPUTE)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a package and a config folder of its own."""
    folder = tmp_path_factory.mktemp("project")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(project: Path) -> Path:
    """Return the folder of a run of own classes, started in the project with a relative config folder."""
    done = launch("--config-dir", "conf", *OWN, *SHORT, "name=r", cwd=project)
    assert done.returncode == 0, done.stderr
    return project / "out" / "default" / "r"


def test_a_run_of_own_classes_records_its_choices(trained: Path) -> None:
    config = OmegaConf.to_container(OmegaConf.load(trained / "config.yaml"))
    assert config["loss"] == {"_target_": "lab.losses.Huber", "delta": 1.0}
    assert config["choices"].items() >= {"masking": "checkerboard", "loss": "huber", "dataset": "noise"}.items()


@pytest.mark.thorough
def test_the_processes_of_a_sweep_find_own_classes_through_the_search_path(project: Path) -> None:
    """The job of the sweep has two processes of its own, and is named after its choices."""
    sweep = (f"hydra.searchpath=[file://{project}/conf]", "seed=1", "hardware.processes=2", "experiment_name=sweep")
    done = launch(
        "--multirun", *sweep, "experiment=ijepa", "masking=checkerboard", "loss=huber", "dataset=noise", *SHORT, cwd=project
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (project / "out" / "sweep").iterdir()
    assert folder.name.rpartition("-")[0] == "noise-vit_nano-flat-checkerboard-huber-s1"


def test_the_config_of_a_run_folder_calls_own_classes_only_with_their_config_folder(trained: Path, project: Path) -> None:
    task = ("task=visualize", f"run={trained}", "task.pictures=[predictions]", *COMPUTE)
    refused = launch(*task, cwd=project)
    assert refused.returncode == 1
    assert "_target_='lab." in refused.stderr
    assert "is not allowed, because no YAML file in conf/ names it" in refused.stderr
    allowed = launch("--config-dir", "conf", *task, cwd=project)
    assert allowed.returncode == 0, allowed.stderr


def test_the_config_of_a_stranger_is_refused_even_beside_a_config_folder(trained: Path, project: Path) -> None:
    folder = trained.parent / "stranger"
    shutil.copytree(trained, folder)
    config = OmegaConf.load(folder / "config.yaml")
    config.loss = {"_target_": "os.system", "command": f"touch {folder}/owned"}
    OmegaConf.save(config, folder / "config.yaml")
    task = ("task=visualize", f"run={folder}", "task.pictures=[predictions]", *COMPUTE)
    for config_folder in ("conf", "."):
        refused = launch("--config-dir", config_folder, *task, cwd=project)
        assert refused.returncode == 1
        assert "_target_='" in refused.stderr
        assert "is not allowed" in refused.stderr
    assert not (folder / "owned").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config-dir", "nowhere"], ["nowhere", "not found"]),
        (["--config-dir", "conf", "loss=hubert"], ["loss=hubert is not an option; did you mean huber?"]),
        (["--config-dir", "conf", "loss=huber", "loss.delta=0"], ["loss.delta=0: expected PositiveFloat"]),
        (["--config-dir", "conf", "loss=huber", "+loss.beta=0"], ["loss.beta is not an option of lab.losses.Huber", "delta"]),
        (["--config-dir", "conf", "dataset=noise", "+dataset.size=9"], ["dataset.size is not an option of lab.noise.Noise"]),
        (["--config-dir", "conf", "loss=missing"], ["_target_=labs.losses.Huber: there is no module labs.losses", "PYTHONPATH"]),
        (["--config-dir", "conf", "loss=unnamed"], ["the module lab.losses has no class or function Hubert"]),
        (["--config-dir", "conf", "loss=broken"], ["importing lab.broken failed at", "a_package_that_is_not_installed"]),
    ],
)
def test_mistakes_get_one_sentence(project: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    done = launch(*arguments, *SHORT, f"output_root={tmp_path}", cwd=project)
    assert done.returncode == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_a_slurm_job_finds_own_classes(project: Path, cluster: Path) -> None:
    short = [option for option in SHORT if not option.startswith("hardware")]
    slurm = ("hardware=slurm_cpu", "hardware.threads=1", "hydra.launcher.mem_gb=2", "hydra.launcher.poll_seconds=0.5")
    done = launch("--config-dir", "conf", *OWN, *short, *slurm, "experiment_name=slurm", cwd=project)
    assert done.returncode == 0, done.stderr
    assert [json.loads(file.read_text())["status"] for file in (project / "out" / "slurm").glob("*/summary.json")] == ["finished"]
