"""The one entry point: `python launch.py [group=option] [key=value]`, see conf/ and `python launch.py --help`."""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from hjepa.config.errors import UserError, friendly_cli_errors

os.environ["HJEPA_ROOT"] = str(Path(__file__).resolve().parent)  # finds conf/, sweeps/ and outputs/ from any folder


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    from hjepa.config.run import run

    try:
        return run(cfg)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    with friendly_cli_errors():
        main()
