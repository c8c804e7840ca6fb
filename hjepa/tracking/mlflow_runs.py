"""How the tracked run of a run folder is found in MLflow, or created."""

from pathlib import Path
from typing import Any

from hjepa.tracking.run_folder import is_copy
from hjepa.tracking.run_name import display_name


def find_run(client: Any, run_id: str, experiments: list[str] | None = None) -> Any:
    """Return a run, or the copy that took its place after it was deleted or its database was replaced; None if there is none.

    Args:
        client: An MlflowClient.
        run_id: Id of the original run.
        experiments: Ids of the experiments that may contain the copy; None for all.
    """
    from mlflow import MlflowException

    try:
        run = client.get_run(run_id)
        if run.info.lifecycle_stage == "active" and is_active(client, run.info.experiment_id):
            return run
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    if experiments is None:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return next(iter(client.search_runs(experiments, f"tags.copy_of = '{run_id}'", max_results=1)), None)


def is_active(client: Any, experiment_id: str) -> bool:
    """Return whether an experiment was not deleted."""
    return bool(client.get_experiment(experiment_id).lifecycle_stage == "active")


def find_run_of_folder(client: Any, experiment_id: str, known_id: str | None, tags: dict[str, str]) -> Any:
    """Return the tracked run of an earlier session, or None.

    This is the run with the id in the run folder, or the copy of it that is in this experiment. Without an id (a crash may have
    come before it was written) it is a run of this folder and config that the server lists as running.

    Args:
        client: An MlflowClient.
        experiment_id: Id of the experiment of the run.
        known_id: Id in the run folder, if there is one.
        tags: Tags of the run.
    """
    if known_id:
        return find_run(client, known_id, [experiment_id])
    same = [f"tags.{key} = '{tags[key]}'" for key in ("run_folder", "config") if key in tags]
    query = " and ".join([*same, "attributes.status = 'RUNNING'"])
    return next(iter(client.search_runs([experiment_id], query, max_results=1)), None)


def belongs_to_another_folder(run: Any, folder: Path) -> bool:
    """Return whether a run is that of another folder, of which this one is a copy."""
    original = run.data.tags.get("run_folder")
    return bool(original) and is_copy(folder, Path(original), "run_id")


def create_run(client: Any, experiment_id: str, folder: Path, params: dict[str, Any], tags: dict[str, str]) -> Any:
    """Create a run.

    Args:
        client: An MlflowClient.
        experiment_id: Id of the experiment of the run.
        folder: Run folder.
        params: Flattened config, from which the run takes its name.
        tags: Tags of the run.
    """
    from mlflow.tracking.context import registry

    name = display_name(folder, params, tags)
    return client.create_run(experiment_id, tags=registry.resolve_tags(tags), run_name=name)
