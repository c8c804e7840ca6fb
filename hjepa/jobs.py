"""A sweep: its jobs, planned before anything starts, and what is known of them in the sweep folder (sweep.json)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from hjepa.config import Config
from hjepa.errors import UserError
from hjepa.folder import RunFolder
from hjepa.run import prepare


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        folder: of its run, None if its config names none; log: where what it said is.
        state: pending, running, finished, collapsed, stopped or FAILED, or what a queue says of it; reason: in one line.
        config: resolved and checked; empty for a FAILED config.
        summary: of its run folder.
    """

    number: int
    overrides: list[str]
    folder: Path | None
    log: Path | None = None
    state: str = "pending"
    reason: str = ""
    slurm_id: str = ""
    config: Config = field(default_factory=dict, repr=False)
    summary: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.state in ("finished", "collapsed", "stopped", "FAILED")


def plan_jobs(loader: ConfigLoader, master: DictConfig, overrides: Sequence[Sequence[str]], first: int = 0) -> list[Job]:
    """Compose every job: a wrong config is FAILED and a finished run is finished before anything starts."""
    jobs: list[Job] = []
    for number, job_overrides in enumerate(overrides, first):
        try:
            config, folder = compose(loader, master, [*job_overrides])
            run = RunFolder(folder, config)
            finished = not config["overwrite"] and run.summary().get("status") == "finished"
        except UserError as error:
            jobs.append(Job(number, list(job_overrides), None, state="FAILED", reason=str(error)))
            continue
        jobs.append(Job(number, list(job_overrides), folder, state="finished" if finished else "pending", config=config))
    return jobs


def compose(loader: ConfigLoader, master: DictConfig, overrides: list[str]) -> tuple[Config, Path]:
    """The checked config of a job and the folder of its run."""
    composed, before = loader.load_sweep_config(master, overrides), HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        return prepare(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
    finally:
        HydraConfig.instance().cfg = before


class Sweep:
    """The folder of a sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "sweep.json"

    def write(self, jobs: list[Job]) -> None:
        """Write sweep.json whole or not at all."""
        rows = [{k: v for k, v in asdict(job).items() if k not in ("config", "summary")} for job in jobs]
        temporary = self.folder / ".sweep.json.tmp"
        temporary.write_text(json.dumps({"sweep": self.folder.name, "jobs": rows}, indent=2, default=str) + "\n")
        temporary.replace(self.file)

    def refresh(self, jobs: list[Job]) -> None:
        """Learn states and results from the run folders; a failure stays one until its run is continued."""
        for job in jobs:
            file = job.folder / "summary.json" if job.folder else None
            if not file or not file.exists():
                continue
            summary = json.loads(file.read_text())
            if job.state == "FAILED" and file.stat().st_mtime <= self.file.stat().st_mtime:
                continue
            job.summary = summary
            job.state = {"failed": "FAILED"}.get(summary["status"], summary["status"])
            job.reason = summary.get("reason") or ""

    def end(self, jobs: list[Job]) -> None:
        """Print the table."""
        self.write(jobs)
        self.refresh(jobs)
        self.write(jobs)
        print("\nSweep:")
        for job in jobs:
            print(f"{job.number:3d}  {job.slurm_id:>8}  {' '.join(job.overrides)}  {job.state}  {job.reason}  {job.log or ''}")
        print(f"Sweep folder: {self.folder}", flush=True)

    def returns(self, jobs: list[Job]) -> list[JobReturn]:
        """What Hydra's sweeper gets.

        Raises:
            UserError: a job did not come to its end.
        """
        missing = [str(job.number) for job in jobs if job.state not in ("finished", "collapsed")]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(jobs)} jobs did not finish (number {', '.join(missing)}): the table says why; "
                "the same command does what is missing."
            )
        values = [job.summary.get("probe", {}).get("linear") for job in jobs]
        return [JobReturn(j.overrides, status=JobStatus.COMPLETED, _return_value=v) for j, v in zip(jobs, values, strict=True)]
