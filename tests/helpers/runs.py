"""Tiny configs, their components, and runs as a user types them."""

import os
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ |= {"HJEPA_ROOT": str(ROOT), "HJEPA_HOME": str(ROOT)}
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tests run side by side: one thread each, which does not spin while it waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Prediction of hidden patches by a ViT, at several levels: the machinery that most tests are about.
MASKED_GROUPS = (
    "model=vit_nano",
    "levels=pyramid_summary",
    "masking=random",
    "loss=smooth_l1",
    "regularizer=vicreg",
    "projector=none",
    "teacher=ema",
)
MASKED = (
    *MASKED_GROUPS,
    "schedule.lr.warmup_epochs=1",
    "dataset.views=1",
    "dataset.fade=0",
    "dataset.augment.scale=[0.3,1.0]",
    "dataset.augment.jitter=0",
    "dataset.augment.grayscale=0",
)

# Prediction across the views of an image, as in the default experiment.
VIEWS = ("levels=views", "loss=infonce", "regularizer=none", "projector=mlp", "teacher=none", "masking=none")

SMALL_VIT = (
    "model.encoder.dim=32",
    "model.encoder.depth=2",
    "model.encoder.heads=2",
    "model.predictor.dim=32",
    "model.predictor.depth=1",
    "model.predictor.heads=2",
)

# Few images and steps.
BRIEF = (
    "dataset.train=240",
    "dataset.test=40",
    "train.batch_size=24",
    "train.epochs=2",
    "train.log_every=2",
    "probe.train_images=100",
    "probe.penalties=[0.01]",
    "hardware=cpu",
    "hardware.threads=1",
    "tracking=none",
)

# A run of a few seconds: a small ViT on few images.
TINY = (*MASKED, *SMALL_VIT, *BRIEF)
OF_VITS = ("model.encoder.dim", "model.encoder.depth", "model.encoder.heads")  # options that convolutional networks do not have
OF_SHAPES = ("dataset.train", "dataset.test", "dataset.fade")  # options that other datasets do not have


def tiny(*overrides: str) -> list[str]:
    """Return the overrides of a tiny run and further ones, which replace those with the same key.

    Another dataset, a convolutional network, and a recipe keep what is their own.
    """
    keys = [override.split("=")[0] for override in overrides]
    is_convolutional = any(override.startswith(("model=conv", "model=timm")) for override in overrides)
    dropped = (*keys, *(OF_SHAPES if "dataset" in keys else ()), *(OF_VITS if is_convolutional else ()))
    options = (*SMALL_VIT, *BRIEF) if "experiment" in keys else TINY
    return [*(option for option in options if option.split("=")[0] not in dropped), *overrides]


def compose(*overrides: str) -> Any:
    """Compose a config, and make its hydra node the current one."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra_compose("config", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    from omegaconf import open_dict

    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def launch(*overrides: str, cwd: Path = ROOT, timeout: float = 500, **env: str) -> subprocess.CompletedProcess[str]:
    """`python launch.py ...` as a user types it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *overrides],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def build_components(*overrides: str) -> Any:
    """Return the components of a tiny run."""
    from hjepa.training.build import build_components

    return build_components(checked_config(*overrides))


def trainer(*overrides: str) -> Any:
    """Return the trainer of a tiny run, with its images loaded."""
    from hjepa.config.instantiate import build
    from hjepa.training.build import build_components

    config = checked_config(*overrides)
    components = build_components(config)
    train, _ = components.dataset.train_and_validation()
    return build(config["train"], components=components, images=train.images)


def checked_config(*overrides: str) -> Any:
    """Return the resolved and checked config of a tiny run."""
    return deepcopy(compose_and_check(*overrides))


@cache
def compose_and_check(*overrides: str) -> Any:
    """Do what `checked_config` does, once for the same overrides, since Hydra needs almost a second."""
    from hjepa.config.schema import check, resolve

    config = resolve(compose(*tiny(*overrides)))
    check(config)
    return config


def plan(steps: int, steps_per_epoch: int) -> Any:
    """Return a plan with a batch size of 1 and epochs of equal length."""
    from hjepa.optim.step_plan import StepPlan

    return StepPlan(num_images=steps_per_epoch, epochs=None, length=steps, batch_size=1)
