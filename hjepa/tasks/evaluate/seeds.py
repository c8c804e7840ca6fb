"""Means and standard deviations over runs that differ by their seed only."""

import json
from pathlib import Path
from typing import Any

from hjepa.config.identity import identity, short_hash
from hjepa.tasks.evaluate.results import Results
from hjepa.tasks.evaluate.tables import over_runs, table_of_runs
from hjepa.tracking.atomic import atomic_write
from hjepa.tracking.run_folder import check_writable, read_config


def compare(root: Path, found: dict[Path, Results]) -> None:
    """Print, and keep in evaluate/ of the folder, every run of a group and the group's means, where a group has several runs."""
    texts: list[str] = []
    groups: list[dict[str, Any]] = []
    for folders in same_but_seed(list(found)):
        if len(folders) < 2:
            continue
        runs = [found[folder] for folder in folders]
        named = dict(zip(names(folders, runs), runs, strict=True))
        texts.append(f"{len(runs)} runs that differ by their seed only: {', '.join(folder.name for folder in folders)}")
        shared = [name for name in runs[0].protocols if all(name in results.protocols for results in runs)]
        means = {}
        for protocol in shared:
            rows = {name: results.rows(protocol) for name, results in named.items()}
            means[protocol] = over_runs(rows)
            texts.append(table_of_runs(protocol, runs[0].about(protocol), rows))
        groups.append({"runs": [str(folder) for folder in folders], "means": means})
    if groups:
        place = root / "evaluate"
        check_writable(place, "make it writable")
        place.mkdir(exist_ok=True)
        atomic_write(place / "summary.json", json.dumps({"status": "finished", "groups": groups}, indent=2) + "\n")
        atomic_write(place / "table.txt", "\n\n".join(texts) + "\n")
        print("\n" + "\n\n".join(texts) + f"\n\nOver the seeds: {place}/summary.json and table.txt", flush=True)


def same_but_seed(folders: list[Path]) -> list[list[Path]]:
    """The folders in groups of runs that differ by their seed only."""
    groups: dict[str, list[Path]] = {}
    for folder in folders:
        groups.setdefault(short_hash(identity(read_config(folder)) | {"seed": None}), []).append(folder)
    return list(groups.values())


def names(folders: list[Path], runs: list[Results]) -> list[str]:
    """What runs are called: by their seed or, where two have the same, by their folder."""
    seeds = [f"seed {results.summary['seed']}" for results in runs]
    return seeds if len(set(seeds)) == len(seeds) else [folder.name for folder in folders]
