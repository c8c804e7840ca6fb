"""Upgrade the configs, checkpoints and summaries that earlier versions of hjepa wrote.

Version 0.2 renamed classes, options and summary keys. The tables below map every old name to its new one. `NEW_OPTIONS` holds the
options that earlier configs lack, with the values that stand for what those runs did. All of this is applied when a file is read,
so that nothing on disk has to change.
"""

from typing import Any

RENAMED_TARGETS = {
    "hjepa.checkpoint.Checkpoints": "hjepa.training.Checkpointer",
    "hjepa.data.augment.Augment": "hjepa.data.Augment",
    "hjepa.data.downloaded.Torchvision": "hjepa.data.TorchvisionDataset",
    "hjepa.data.embedded.Shapes": "hjepa.data.Shapes",
    "hjepa.data.folders.ImageFolder": "hjepa.data.ImageFolder",
    "hjepa.data.folders.ImageNet": "hjepa.data.ImageNet",
    "hjepa.data.folders.Mixture": "hjepa.data.FolderMixture",
    "hjepa.encoder.Encoder": "hjepa.models.ViTEncoder",
    "hjepa.evaluate.dense.Dense": "hjepa.tasks.evaluate.DenseProbe",
    "hjepa.evaluate.evaluate.evaluate": "hjepa.tasks.evaluate_runs",
    "hjepa.evaluate.fewshot.Fewshot": "hjepa.tasks.evaluate.FewShot",
    "hjepa.evaluate.finetune.Finetune": "hjepa.tasks.evaluate.FineTuning",
    "hjepa.evaluate.probing.KNN": "hjepa.tasks.evaluate.KNNProbe",
    "hjepa.evaluate.probing.Linear": "hjepa.tasks.evaluate.LinearProbe",
    "hjepa.evaluate.quality.Quality": "hjepa.tasks.evaluate.Quality",
    "hjepa.export.export.export": "hjepa.tasks.export_encoder",
    "hjepa.export.features.features": "hjepa.tasks.export_features",
    "hjepa.hardware.Hardware": "hjepa.distributed.Hardware",
    "hjepa.levels.Levels": "hjepa.models.Levels",
    "hjepa.look.visualize.visualize": "hjepa.tasks.visualize_run",
    "hjepa.masks.Block": "hjepa.masking.InverseBlockMasking",
    "hjepa.masks.Everything": "hjepa.masking.NoMasking",
    "hjepa.masks.Hierarchical": "hjepa.masking.HierarchicalMasking",
    "hjepa.masks.Multiblock": "hjepa.masking.MultiblockMasking",
    "hjepa.masks.Partition": "hjepa.masking.PartitionMasking",
    "hjepa.masks.Random": "hjepa.masking.RandomMasking",
    "hjepa.measure.benchmark.benchmark": "hjepa.tasks.run_benchmark",
    "hjepa.model.HJEPA": "hjepa.models.HJEPA",
    "hjepa.optim.adamw": "hjepa.optim.create_adamw",
    "hjepa.optim.lars": "hjepa.optim.create_lars",
    "hjepa.optim.muon": "hjepa.optim.create_muon",
    "hjepa.optim.soap": "hjepa.optim.create_soap",
    "hjepa.predictor.Predictor": "hjepa.models.Predictor",
    "hjepa.probes.Probe": "hjepa.metrics.Probe",
    "hjepa.projector.Projector": "hjepa.models.Projector",
    "hjepa.regularizers.InfoNCE": "hjepa.losses.InfoNCE",
    "hjepa.regularizers.SIGReg": "hjepa.losses.SIGReg",
    "hjepa.regularizers.VICReg": "hjepa.losses.VICReg",
    "hjepa.report.report.report": "hjepa.tasks.write_report",
    "hjepa.run.train": "hjepa.tasks.train_model",
    "hjepa.schedules.Constant": "hjepa.optim.ConstantSchedule",
    "hjepa.schedules.Cosine": "hjepa.optim.CosineSchedule",
    "hjepa.schedules.Linear": "hjepa.optim.LinearSchedule",
    "hjepa.schedules.Rates": "hjepa.optim.OptimizerSchedules",
    "hjepa.schedules.WSD": "hjepa.optim.WSDSchedule",
    "hjepa.stacked.Upper": "hjepa.models.StackedLevel",
    "hjepa.sweep.compare.compare": "hjepa.tasks.compare_runs",
    "hjepa.sweep.sweep.SweepStart": "hjepa.sweeps.SweepStart",
    "hjepa.sweep.sweep.show": "hjepa.tasks.show_sweep",
    "hjepa.teacher.EMA": "hjepa.training.EMA",
    "hjepa.teacher.Frozen": "hjepa.training.Frozen",
    "hjepa.teacher.Refresh": "hjepa.training.PeriodicCopy",
    "hjepa.teacher.Shared": "hjepa.training.SharedWeights",
    "hjepa.tracking.board.TensorBoard": "hjepa.tracking.TensorBoard",
    "hjepa.tracking.mlflow.MLflow": "hjepa.tracking.MLflow",
    "hjepa.tracking.sync.sync": "hjepa.tasks.sync_runs",
    "hjepa.tracking.wandb.Wandb": "hjepa.tracking.Wandb",
    "hjepa.trainer.Trainer": "hjepa.training.Trainer",
}
RENAMED_OPTIONS = {"neighbours": "neighbors"}
NEW_OPTIONS: dict[str, dict[str, Any]] = {  # config group -> option -> value
    "model": {"features": "last", "pretrained_key": None},
    "dataset": {"early_size": None, "early_share": 0.5, "max_images": None},
    "levels": {
        "view": ["same"],
        "project": [False],
        "predictor": ["attention"],
        "matching": {"_target_": "hjepa.models.MatchingPredictor", "_partial_": True, "depth": 0, "hidden": 512},
        "loss": {},
    },
}
RENAMED_SUMMARY_KEYS = {"normalised": "normalized", "utilisation": "utilization"}


def upgrade_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a run with the names and options of this version; `choices` is empty where it was not recorded."""
    upgraded: dict[str, Any] = {"choices": {}, **upgrade_names(config)}
    if "overwrite" in upgraded:  # a complete config, and not the identity of a run
        upgraded.setdefault("extend", False)
    for group, options in NEW_OPTIONS.items():
        if isinstance(upgraded.get(group), dict):
            upgraded[group] = options | upgraded[group]
    if isinstance(dataset := upgraded.get("dataset"), dict):
        if dataset.get("_target_") == "hjepa.data.Shapes":
            dataset.setdefault("fade", 0.0)
        if "max_corrupt" in dataset:  # of image files, whose transparency was ignored
            dataset.setdefault("background", None)
            dataset.setdefault("max_megapixels", 179.0)
    if isinstance(teacher := upgraded.get("teacher"), dict) and teacher.get("_target_") == "hjepa.training.Frozen":
        teacher.setdefault("weights_key", None)
    if isinstance(schedule := upgraded.get("schedule"), dict) and isinstance(lr := schedule.get("lr"), dict):
        upgraded["schedule"] = {**schedule, "lr": upgrade_warmup(lr)}
    if isinstance(levels := upgraded.get("levels"), dict) and "depth" in levels:
        levels["stage"] = [-1 if fraction == 1 else fraction for fraction in levels.pop("depth")]  # 1.0 was the last layer
    return upgraded


def upgrade_warmup(schedule: dict[str, Any]) -> dict[str, Any]:
    """Add the option `warmup_ratio`, which has no effect beside a warm-up in epochs or steps, as earlier configs have it."""
    if "warmup_ratio" in schedule or "warmup_epochs" not in schedule:
        return schedule
    steps = schedule.get("warmup_steps") or (None if schedule["warmup_epochs"] else 0)
    return schedule | {"warmup_ratio": 0.1, "warmup_steps": steps}


def upgrade_names(config: Any) -> Any:
    """Return a part of a config with the targets and options that this version uses.

    Args:
        config: Plain data (dictionaries, lists and values), as read from `config.yaml` or from a checkpoint.

    Returns:
        A copy with every renamed `_target_` and option replaced.
    """
    if isinstance(config, list):
        return [upgrade_names(value) for value in config]
    if not isinstance(config, dict):
        return config
    upgraded = {RENAMED_OPTIONS.get(key, key): upgrade_names(value) for key, value in config.items()}
    if isinstance(target := upgraded.get("_target_"), str):
        upgraded["_target_"] = RENAMED_TARGETS.get(target, target)
    return upgraded


def upgrade_summary(summary: dict[str, Any], started_from_weights: bool) -> dict[str, Any]:
    """Return the contents of a `summary.json` with the keys that this version uses.

    Earlier versions called the weights that a run started from untrained, and did not measure random ones.
    """
    upgraded = {RENAMED_SUMMARY_KEYS.get(key, key): value for key, value in summary.items()}
    if "untrained" in upgraded and "initial" not in upgraded:
        scores = upgraded["untrained"]
        upgraded |= {"untrained": {}, "initial": scores} if started_from_weights else {"initial": {}}
    return upgraded
