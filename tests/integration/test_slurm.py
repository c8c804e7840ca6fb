"""The SLURM launcher on a real SLURM: interrupted runs are bitwise equal, failures are reported, submitted configs are fixed."""

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from tests.helpers.children import launch
from tests.helpers.cluster import job_fields, let_node_die, poll, process_of, slurm
from tests.helpers.database import prepare_database
from tests.helpers.results import check_mlflow, metrics, weights
from tests.helpers.runs import ROOT, TINY

pytestmark = pytest.mark.usefixtures("cluster")

SUBMIT = (
    *(option for option in TINY if option != "hardware=cpu"),
    "hardware=slurm_cpu",
    "hydra.launcher.mem_gb=2",
    "hydra.launcher.poll_seconds=0.5",
    "experiment_name=e",
)
LONG = ("train.epochs=9", "train.log_every=3", "probe.every=3", "model.encoder.drop_path=0.1", "checkpoint.every_seconds=1000")
ON_HOLD = "+hydra.launcher.additional_parameters.hold=true"
INTERRUPTIONS = ("time_limit", "requeue", "preempted", "dead_node")


def start(*overrides: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *overrides],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def jobs_of(root: Path) -> list[dict]:
    """Return the jobs of the only sweep under an output root; empty before it is submitted."""
    files = list(root.glob("sweeps/*/sweep.json"))
    return json.loads(files[0].read_text())["jobs"] if files else []


def cancel(root: Path) -> None:
    slurm("scancel", *{job["slurm_id"].split("_")[0] for job in jobs_of(root)})


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# -- interruptions ----------------------------------------------------------------------------------------------------------


def suspend_in_the_middle(folder: Path, job: str) -> int:
    """Suspend the process of a job in the middle of its run, so that an interruption happens there, and return its id."""
    file = folder / "metrics.jsonl"
    poll(file.exists, 120, f"start of {folder.name}")
    pid = process_of(job_fields(job)["JobId"])
    poll(lambda: len(file.read_text().splitlines()) >= 5, 120, f"training in {folder.name}")
    suspend(pid)
    while not is_unlocked(folder.parents[1] / "mlflow.db"):  # it would block the other jobs
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)  # continue to another point of its work
        suspend(pid)
    assert not (folder / "summary.json").exists(), "still in the middle"
    return pid


def suspend(pid: int) -> None:
    """Suspend a process, and wait until each of its threads has stopped."""
    os.kill(pid, signal.SIGSTOP)
    poll(lambda: all(state(thread) == "T" for thread in Path(f"/proc/{pid}/task").iterdir()), 30, "suspension")


def state(thread: Path) -> str:
    """Return the state of a thread, given its folder in /proc; stopped if it has ended."""
    try:
        return (thread / "stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "T"


def is_unlocked(database: Path) -> bool:
    """Return whether no other process reads or writes a database; one that reads would keep others from committing."""
    connection = sqlite3.connect(database, timeout=1)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        return True
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()


def interrupt(kind: str, job: str, folder: Path, cluster: Path) -> None:
    """Let SLURM interrupt a job in the middle of its run; a suspended process continues when SLURM sends its signal."""
    suspend_in_the_middle(folder, job)
    if kind == "time_limit":
        slurm("scontrol", "update", f"jobid={job}", "timelimit=3")  # less than hydra.launcher.signal_delay_s from now
        poll(lambda: job_fields(job)["Restarts"] == "1", 60, "back in the queue")
        slurm("scontrol", "update", f"jobid={job}", "timelimit=60")
        assert summary(folder)["status"] == "requeued"
        run = MlflowClient(f"sqlite:///{folder.parents[1]}/mlflow.db").get_run((folder / "run_id").read_text())
        assert run.info.status == "SCHEDULED"
    elif kind == "requeue":
        slurm("scontrol", "requeue", job)
    elif kind == "dead_node":
        let_node_die("node4", cluster)
    else:
        slurm("sbatch", "-p", "urgent", "-w", "node3", "--exclusive", "-o", "/dev/null", "--wrap", "true")


@pytest.fixture(scope="module")
def interrupted(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """Run one config without and with each interruption; return the output root, and SLURM's fields of each job."""
    root = tmp_path_factory.mktemp("interrupted")
    prepare_database(root)
    command = ("--multirun", *SUBMIT, *LONG, "tracking=mlflow", f"output_root={root}", ON_HOLD)
    submits = [
        start(*command, "name=reference,time_limit,requeue", f"hydra.sweep.dir={root}/sweeps/lab"),
        start(*command, "name=preempted", "hydra.launcher.partition=scavenge", f"hydra.sweep.dir={root}/sweeps/scavenge"),
        start(
            *command,
            "checkpoint.every_seconds=0.01",  # nothing announces this end
            *("name=dead_node", "hydra.launcher.partition=fragile", f"hydra.sweep.dir={root}/sweeps/fragile"),
        ),
    ]
    poll(lambda: len(list(root.glob("sweeps/*/sweep.json"))) == len(submits), 120, "submission")
    ids = {}
    for file in root.glob("sweeps/*/sweep.json"):
        for job in json.loads(file.read_text())["jobs"]:
            ids[Path(job["folder"]).name] = job["slurm_id"]
    slurm("scontrol", "release", ",".join({job.partition("_")[0] for job in ids.values()}))  # none ends before all are submitted
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kind: interrupt(kind, ids[kind], root / "e" / kind, cluster), INTERRUPTIONS))
    for process in submits:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output + "".join(f"\n{log}:\n{log.read_text()}" for log in root.glob("sweeps/*/*.log"))
    poll(lambda: not slurm("squeue", "-h"), 30, "end of all jobs")
    return root, {kind: job_fields(job) for kind, job in ids.items()}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", INTERRUPTIONS)
def test_an_interrupted_run_is_bitwise_equal(interrupted: tuple[Path, dict[str, dict[str, str]]], kind: str) -> None:
    root, jobs = interrupted
    assert jobs[kind]["Restarts"] == "1"
    assert jobs[kind]["JobState"] == "COMPLETED"
    assert summary(root / "e" / kind)["status"] == "finished"
    log = (root / "e" / kind / "run.log").read_text()
    assert log.count("resuming at step") == 1, "it continued from its checkpoint"
    a, b = weights(root / "e" / "reference"), weights(root / "e" / kind)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert metrics(root / "e" / "reference") == metrics(root / "e" / kind), "no step is repeated, missing or different"


@pytest.mark.thorough
def test_interrupted_runs_are_one_finished_run_each_in_mlflow(interrupted: tuple[Path, dict[str, dict[str, str]]]) -> None:
    check_mlflow(interrupted[0], ("reference", *INTERRUPTIONS))


# -- failures --------------------------------------------------------------------------------------------------------------


def rows(output: str) -> dict[str, str]:
    """Return the lines of the table by job number."""
    table = re.split(r"^Sweep \S+:$", output, flags=re.MULTILINE)[-1]
    lines = table.partition("\nPlots:")[0].splitlines()
    return {line.split()[0]: line for line in lines if line[:1].isdigit()}


@pytest.mark.thorough
def test_failures_are_reported_and_stop_no_other_job(tmp_path: Path) -> None:
    """One job of five finishes; the others have a wrong config, fail in training, are killed, and are cancelled."""
    root = tmp_path / "elsewhere" / "out"
    prepare_database(root)
    process = start(
        "--multirun",
        *SUBMIT,
        *LONG,
        "train.epochs=12",  # the last job is still running when the one before has been killed
        "tracking=mlflow",
        "output_root=out",
        "optimizer.lr=1e-3,x,1e30,2e-3,3e-3",
        cwd=tmp_path / "elsewhere",
    )
    poll(lambda: jobs_of(root), 120, "submission")
    fine, wrong, failing, killed, cancelled = jobs_of(root)
    os.kill(suspend_in_the_middle(Path(killed["folder"]), killed["slurm_id"]), signal.SIGKILL)
    suspend_in_the_middle(Path(cancelled["folder"]), cancelled["slurm_id"])
    slurm("scancel", cancelled["slurm_id"])
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "Traceback" not in "".join(rows(output).values())
    for job, state, reason in (
        (fine, "finished", ""),
        (wrong, "FAILED", "optimizer.lr='x': expected PositiveFloat"),
        (failing, "FAILED", "The loss or gradient of step"),
        (killed, "FAILED", "ended by SLURM as FAILED; its log ends with: srun: error: "),
        (cancelled, "FAILED", "ended by SLURM as CANCELLED"),
    ):
        row = rows(output)[str(job["number"])]
        assert f" {state} " in f"{row} ", output
        assert reason in row, output
    assert all(Path(job["log"]).read_text() for job in (fine, failing, killed, cancelled))
    poll(lambda: job_fields(failing["slurm_id"])["JobState"] == "FAILED", 30, "SLURM lists the job as failed")
    assert summary(Path(cancelled["folder"]))["status"] == "stopped"

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    states = {run.data.tags["run_folder"]: run.info.status for run in runs}
    assert [states[job["folder"]] for job in (fine, failing, cancelled)] == ["FINISHED", "FAILED", "KILLED"]


@pytest.mark.thorough
def test_the_death_of_any_rank_fails_the_job(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('SLURM_PROCID') == '1':\n    os._exit(3)\n")
    options = ("tracking=none", f"output_root={tmp_path}", "hydra.launcher.tasks_per_node=2", "hardware.processes=2")
    result = launch(*SUBMIT, *options, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert result.returncode == 1
    assert "ended by SLURM as FAILED" in rows(result.stdout)["0"]


@pytest.mark.thorough
def test_the_tasks_of_a_job_are_the_processes_of_a_run(tmp_path: Path) -> None:
    options = ("tracking=none", f"output_root={tmp_path}", "name=r", "hydra.launcher.tasks_per_node=2", "hardware.processes=2")
    result = launch(*SUBMIT, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert summary(tmp_path / "e" / "r")["device"].startswith("2 processes of cpu")


@pytest.mark.thorough
def test_a_run_that_is_cancelled_while_it_waits_to_be_continued_is_stopped(tmp_path: Path) -> None:
    prepare_database(tmp_path)
    process = start(*SUBMIT, *LONG, "tracking=mlflow", f"output_root={tmp_path}", "name=r")
    poll(lambda: jobs_of(tmp_path), 120, "submission")
    (job,) = jobs_of(tmp_path)
    folder = Path(job["folder"])
    pid = suspend_in_the_middle(folder, job["slurm_id"])
    slurm("scontrol", "update", "partitionname=lab", "state=down")  # which starts no jobs
    try:
        slurm("scancel", "--signal=USR2", job["slurm_id"])
        os.kill(pid, signal.SIGCONT)
        poll(lambda: job_fields(job["slurm_id"])["JobState"] == "PENDING", 60, "back in the queue")
        assert summary(folder)["status"] == "requeued"
        slurm("scancel", job["slurm_id"])
    finally:
        slurm("scontrol", "update", "partitionname=lab", "state=up")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "ended by SLURM as CANCELLED" in rows(output)["0"]
    assert summary(folder)["status"] == "stopped"
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run((folder / "run_id").read_text())
    assert run.info.status == "KILLED"


# -- submission ------------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_submitted_job_keeps_its_config_and_reports_changed_code(tmp_path: Path) -> None:
    """Edit config and code while a job waits: it uses the submitted config, and logs and tags the change of the code."""
    source = tmp_path / "source"
    for name in ("launch.py", "conf", "hjepa", "hydra_plugins"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m a"):
        subprocess.run(["git", *command.split()], cwd=source, check=True)
    command = [*SUBMIT, "tracking=mlflow", f"output_root={tmp_path}/out", "name=r"]

    def submit(*overrides: str) -> str:
        line = [sys.executable, str(source / "launch.py"), *command, "hydra.launcher.wait=false", *overrides]
        return subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    output, (job,) = submit(ON_HOLD), jobs_of(tmp_path / "out")
    assert all(str(word) in output for word in (job["slurm_id"], job["folder"], "scancel", "task=sweep"))
    optimizer, code = source / "conf" / "optimizer" / "adamw.yaml", source / "hjepa" / "losses" / "prediction.py"
    assert "lr: 2.0e-3" in optimizer.read_text()
    optimizer.write_text(optimizer.read_text().replace("lr: 2.0e-3", "lr: 9.0"))
    code.write_text(code.read_text() + "# changed\n")
    slurm("scontrol", "release", job["slurm_id"])
    poll(lambda: not slurm("squeue", "-h"), 120, "end of the job")
    folder = tmp_path / "out" / "e" / "r"
    assert summary(folder)["status"] == "finished"
    assert "lr: 0.002" in (folder / "config.yaml").read_text()
    assert "THE CODE HAS CHANGED" in (folder / "run.log").read_text()

    import mlflow

    tags = mlflow.MlflowClient(f"sqlite:///{tmp_path}/out/mlflow.db").get_run((folder / "run_id").read_text()).data.tags
    assert "dirty: False -> True" in tags["code_changed"]
    assert tags["slurm_job"] == job["slurm_id"]
    optimizer.write_text(optimizer.read_text().replace("lr: 9.0", "lr: 2.0e-3"))
    assert "finished" in rows(submit())["0"], "a finished run is not submitted again"
    assert not slurm("squeue", "-h")


def test_resources_are_set_by_the_config(tmp_path: Path) -> None:
    options = {
        "partition": "lab",
        "account": "vision",
        "constraint": "virtual",
        "timeout_min": "90",
        "mem_gb": "3.5",
        "array_parallelism": "3",
        "comment": "hello",
        "exclude": "node2",
        "setup": '["export GREETING=hello"]',
        "wait": "false",
    }
    gpus = [o for o in SUBMIT if not o.startswith(("hardware", "hydra.launcher.mem_gb"))] + ["hardware=slurm_gpu_ddp"]
    launcher = [f"hydra.launcher.{key}={value}" for key, value in options.items()]
    assert launch("--multirun", *gpus, *launcher, ON_HOLD, f"output_root={tmp_path}", "seed=0,1,2,3").returncode == 0
    jobs = jobs_of(tmp_path)
    array = jobs[0]["slurm_id"].split("_")[0]
    assert [job["slurm_id"] for job in jobs] == [f"{array}_{index}" for index in range(4)], "one array"
    fields = job_fields(array)
    names = ("Partition", "Account", "Comment", "ExcNodeList", "Features", "TimeLimit", "MinMemoryNode", "ArrayTaskThrottle")
    assert [fields[name] for name in names] == ["lab", "vision", "hello", "node2", "virtual", "01:30:00", "3.50G", "3"]
    assert (fields["TresPerNode"], fields["Requeue"], fields["JobName"]) == ("gres:gpu:2", "1", "hjepa")
    assert (fields["NumTasks"], fields["CPUs/Task"]) == ("2", "8")
    script = next((tmp_path / "sweeps").glob("*/submitit/*_submission.sh")).read_text()
    assert "\nexport GREETING=hello\n" in script
    assert "--signal=USR2@300" in script
    cancel(tmp_path)


def test_ctrl_c_lists_the_jobs_and_leaves_them_running(tmp_path: Path) -> None:
    process = start("--multirun", *SUBMIT, "tracking=none", ON_HOLD, f"output_root={tmp_path}", "seed=0,1")
    poll(lambda: jobs_of(tmp_path), 120, "submission")
    ids = [job["slurm_id"] for job in jobs_of(tmp_path)]
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    last_lines = output[output.index("Interrupted") :]
    assert all(job in last_lines for job in ids)
    assert f"scancel {ids[0].split('_')[0]}" in last_lines
    assert len(slurm("squeue", "-h", "-r").splitlines()) == 2, "they are still waiting"
    cancel(tmp_path)


def queued() -> set[str]:
    """Return the ids of the jobs in the queue."""
    return set(slurm("squeue", "-h", "-r", "-o", "%i").split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra.launcher.partition=nowhere"], "change hydra.launcher.partition=nowhere to one that `sinfo -s` lists."),
        (
            ["hydra.launcher.timeout_min=long"],
            "hydra.launcher.timeout_min=long: Value 'long' of type 'str' could not be converted",
        ),
        (["hydra.launcher.partitoin=lab"], "hydra.launcher.partitoin is not an option; did you mean partition?"),
        (["hydra.launcher.mem_per_cpu=1G"], "hydra.launcher.mem_per_cpu=1G beside mem_gb=2"),
        (["hydra.launcher.nodes=0"], "hydra.launcher.nodes=0: expected a number above 0"),
        (["hydra.launcher.timeout_min=5"], "signal_delay_s=300 is more than half"),
        (["hardware.processes=2"], "but a job has 1 tasks"),
        (["hydra.launcher.tasks_per_node=2"], "but a job has 2 tasks"),
        (["--multirun", "hardware=slurm_cpu,slurm_gpu"], "cannot be chosen for a part of its jobs"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(tmp_path: Path, overrides: list[str], message: str) -> None:
    options = [o for o in SUBMIT if not ("--multirun" in overrides and o.startswith(("hardware=", "hydra.")))]
    before = queued()  # jobs of an earlier test may still be ending
    result = launch(*overrides, *options, "tracking=none", f"output_root={tmp_path}")
    assert result.returncode == 1
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    assert queued() <= before
    assert {file.stat().st_mode & 0o777 for file in tmp_path.rglob("*.pkl")} <= {0o600}, "configs of jobs contain passwords"
    assert not (tmp_path / "e").exists()


def test_missing_slurm_is_reported_in_one_sentence(tmp_path: Path) -> None:
    result = launch(*SUBMIT, "tracking=none", f"output_root={tmp_path}", PATH=str(tmp_path))
    assert result.returncode == 1
    assert "there is no SLURM here" in result.stderr
