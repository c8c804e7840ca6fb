"""The folder of a run, which its config names.

The same command names the same run folder, so that starting it again continues the run instead of starting another one.
"""

from pathlib import Path

from hjepa.config.errors import UserError
from hjepa.config.extension import find_shorter_run
from hjepa.config.identity import TRAINING, config_hash, is_benchmark
from hjepa.config.schema import Config

LONGEST_NAME = 200  # bytes; file systems allow 255, of which `benchmark-` and temporary files need some

NAME_GROUPS = ("dataset", "model", "levels", "masking", "loss")


def run_path(config: Config) -> Path:
    """Return the absolute path of the run folder: output_root / experiment_name / name.

    The default name consists of the chosen options, the seed and the hash of the config. With `extend=true`, it is the folder of
    the shorter run.

    Raises:
        UserError: `name` or `experiment_name` is not the name of a folder inside of the one that holds it, there is no run to
            extend, or `run` is set although the task reads none.
    """
    check_run_is_read(config)
    check_name("experiment_name", config["experiment_name"])
    if config["name"]:
        check_name("name", config["name"])
    folder = Path(config["output_root"]).expanduser().absolute() / config["experiment_name"]
    words = [config["choices"][group] for group in NAME_GROUPS if group in config["choices"]]
    if is_benchmark(config):
        return folder / ("benchmark-" + (config["name"] or "-".join([*words, config_hash(config)])))
    prefix = "-".join([*words, f"s{config['seed']}", ""])
    path = folder / (config["name"] or prefix + config_hash(config))
    if not (config["extend"] and config["task"]["_target_"] == TRAINING):
        return path
    if config["overwrite"]:
        raise UserError("extend=true keeps an earlier run and overwrite=true deletes it; leave one of them out.")
    if config["run"]:
        path = Path(config["run"]).expanduser().absolute()
    return find_shorter_run(config, path, None if config["name"] or config["run"] else prefix)


def check_run_is_read(config: Config) -> None:
    """Refuse `run` beside a task that reads no earlier run, which would train or measure the model of the command instead."""
    run, is_training = config["run"], config["task"]["_target_"] == TRAINING
    if not run or not (is_benchmark(config) or (is_training and not config["extend"])):
        return
    raise UserError(
        f"run={run} names an earlier run, which task={'train' if is_training else 'benchmark'} does not read. To evaluate it, "
        f"add task=evaluate (or visualize, features, export, report, sync); to train it on, write run={run} extend=true; to "
        f"start a new run from its weights, write init_from={run} instead."
    )


def check_name(key: str, name: str) -> None:
    """Refuse a name that leads out of the folder that holds it, is empty, or is too long for a file system."""
    path = Path(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{key}={name} is not the name of a folder inside of output_root; set output_root for another place.")
    if any(len(part.encode()) > LONGEST_NAME for part in path.parts):
        raise UserError(f"{key}={name[:20]}... is longer than {LONGEST_NAME} bytes; choose a shorter one.")
