"""The one entry point: `python launch.py [group=option] [key=value]`, see conf/ and `python launch.py --help`."""

import os
from pathlib import Path

import hydra
from omegaconf import DictConfig

os.environ["HJEPA_ROOT"] = str(Path(__file__).resolve().parent)  # finds conf/, sweeps/ and outputs/ from any folder


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    from hjepa.run import run

    return run(cfg)


if __name__ == "__main__":
    main()
