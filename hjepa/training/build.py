"""Build the components of a run from the config groups, in the order in which they depend on one another."""

import logging
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from hjepa.config.errors import UserError
from hjepa.config.identity import starts_from_weights
from hjepa.config.instantiate import build, build_or_none
from hjepa.config.schema import Config
from hjepa.data.datamodule import DataModule
from hjepa.distributed.batch_norm import synchronize_batch_norms
from hjepa.distributed.device import Hardware
from hjepa.distributed.process_group import World, init_process_group
from hjepa.distributed.seeding import seed_global
from hjepa.losses import Objective
from hjepa.masking import MaskSampler
from hjepa.models.encoder import Encoder
from hjepa.models.hjepa import HJEPA
from hjepa.models.pretrained import load_model
from hjepa.models.stacked import StackedMaskSampler
from hjepa.optim.schedules import OptimizerSchedules
from hjepa.training.parallel import DDPStrategy, FSDPStrategy
from hjepa.training.teacher import TeacherUpdate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """Everything that a training step needs; most fields are instantiated from the config group of the same name."""

    seed: int
    world: World
    strategy: DDPStrategy
    hardware: Hardware
    dataset: DataModule
    sampler: MaskSampler
    model: HJEPA
    objective: Objective
    teacher_update: TeacherUpdate
    optimizer: Optimizer
    schedule: OptimizerSchedules


def build_components(config: Config) -> Components:
    """Build the components of a run; raise `UserError` for options that do not fit together, before any data is read."""
    hardware: Hardware = build(config["hardware"])
    world = init_process_group(hardware.device.type == "cuda")
    if world.size > 1 and hardware.device.type not in ("cpu", "cuda"):
        raise UserError(f"hardware.processes={world.size}: several processes need a CPU or CUDA; add hardware.device=cpu.")
    hardware.prepare(world)
    dataset: DataModule = build(config["dataset"])
    model, sampler, objective = build_model(config)
    check_options(config, dataset, objective)
    if dataset.early_size and (sampler.hides_patches or model.upper):
        raise UserError(
            f"dataset.early_size={dataset.early_size}: masks and stacked levels are made for images of "
            f"dataset.image_size={dataset.image_size} only; choose masking=none and levels.upper=null, or set "
            "dataset.early_size to null."
        )
    if model.student.image_size != dataset.image_size:
        raise UserError(
            f"model.image_size={model.student.image_size}: the images have dataset.image_size={dataset.image_size}; set "
            "dataset.image_size, which the model follows."
        )
    if sampler.hides_patches:
        model.student.check_masks()
    check_view_count(objective, dataset, sampler)
    check_other_views(model, dataset, sampler)
    check_last_stage(model)
    if config["init_from"]:
        load_model(model, config["init_from"])
    teacher_update: TeacherUpdate = build(config["teacher"])
    teacher_update.attach(model)
    model.set_teacher_kind(given=teacher_update.never_changes)
    if world.main:
        warn_of_collapse(objective, model)
    if world.size > 1:
        synchronize_batch_norms(model, hardware.device)
    hardware.prepare_model(model, model.blocks())
    strategy = FSDPStrategy(world) if hardware.shard else DDPStrategy(world)
    strategy.shard(model, hardware.device)
    return Components(
        seed=config["seed"],
        world=world,
        strategy=strategy,
        hardware=hardware,
        dataset=dataset,
        sampler=sampler,
        model=model,
        objective=objective,
        teacher_update=teacher_update,
        optimizer=build(config["optimizer"], model=model),
        schedule=build(config["schedule"]),
    )


def build_untrained(config: Config, device: torch.device) -> Encoder | None:
    """Return the encoder with the random weights of the seed, on the device, if the run starts from given weights instead."""
    if not starts_from_weights(config):
        return None
    model, _, _ = build_model(config | {"model": config["model"] | {"pretrained": None, "pretrained_key": None}})
    return model.encoder.to(device)


def build_model(config: Config) -> tuple[HJEPA, MaskSampler, Objective]:
    """Build the model with the initial weights of the seed, on the CPU, its mask sampler and its objective."""
    seed_global(config["seed"], "init")
    levels = build(config["levels"])
    projector = build_or_none(config["projector"])
    objective = Objective(build(config["loss"]), build_or_none(config["regularizer"]), levels.loss)
    model: HJEPA = build(
        config["model"],
        levels=levels,
        projector=projector,
        regularized=objective.regularized_levels,
        compares_images=objective.compares_images,
    )
    sampler = build(config["masking"], grid=model.grid, pools=model.mask_pools)
    if model.upper:
        sampler = StackedMaskSampler(sampler, model.upper.stacked_levels())
    return model, sampler, objective


def check_options(config: Config, dataset: DataModule, objective: Objective) -> None:
    """Raise `UserError` for combinations of options that have no effect or do not fit together."""
    regularizer, levels, patch = "_target_" in config["regularizer"], config["levels"]["pool"], config["model"]["patch_size"]
    if not regularizer and not levels:
        raise UserError("levels=none with regularizer=none leaves nothing to minimize; choose levels or a regularizer.")
    train, hardware = config["train"], config["hardware"]
    smallest = train["batch_start"] or train["batch_size"]
    if (regularizer or objective.compares_images) and smallest // train["accumulate"] < 2:
        raise UserError(
            f"train.accumulate={train['accumulate']} parts of a batch of {smallest} have one image each, but the loss compares "
            "images; use fewer parts or larger batches."
        )
    if train["histograms"] and hardware["shard"]:
        raise UserError(
            f"train.histograms={train['histograms']} needs complete weights; set it to null, or set hardware.shard=false."
        )
    if dataset.local_views and not regularizer and "other" not in config["levels"]["view"]:
        raise UserError(
            f"dataset.local_views={dataset.local_views} has an effect only with a regularizer or with levels.view=[other]; "
            "choose one, or set it to 0."
        )
    if dataset.local_views and dataset.local_size % patch:
        raise UserError(f"dataset.local_size={dataset.local_size} must be a multiple of model.patch_size={patch}.")
    if dataset.early_size and (dataset.early_size % patch or dataset.early_size > dataset.image_size):
        raise UserError(
            f"dataset.early_size={dataset.early_size} must be a multiple of model.patch_size={patch} and at most "
            f"dataset.image_size={dataset.image_size}."
        )


def check_other_views(model: HJEPA, dataset: DataModule, sampler: MaskSampler) -> None:
    """Raise `UserError` if levels with targets in other views do not fit the crops or the masks."""
    if not model.needs_views:
        return
    if dataset.views + dataset.local_views < 2:
        raise UserError(
            f"levels.view=[other] predicts other views of an image, but there is only one: set dataset.views=2 or more (now "
            f"{dataset.views}), or dataset.local_views."
        )
    if model.matching is not None and sampler.hides_patches:
        raise UserError(
            "levels.predictor=[matching] reads the student's output at the place of the target, which must not be hidden; choose "
            "masking=none, or levels.predictor=[attention]."
        )
    sizes = {"local_size": dataset.local_size if dataset.local_views else 0, "early_size": dataset.early_size or 0}
    for option, size in sizes.items():
        for level in model.levels if size else []:
            grid = model.student.layer_grids[level.layer - 1] * size // dataset.image_size
            if level.other and level.pool and grid % min(level.pool, grid):
                raise UserError(
                    f"levels.pool={level.pool} does not divide the grid of {grid}x{grid} that crops of dataset.{option}={size} "
                    f"have in {level.name}; use another pool or another size."
                )


def check_last_stage(model: HJEPA) -> None:
    """Raise `UserError` if no loss depends on the last stage of the encoder; the transformer of `model.predictor` reads it."""
    trained = {*model.level_layers, *model.regularized_layers}
    trained_by_upper = model.upper is not None and not model.upper.detach
    if model.predictor is None and not trained_by_upper and model.last_layer not in trained:
        raise UserError(
            f"levels.stage={[level.layer for level in model.levels]}: no level trains the last stage of the encoder, which "
            f"probes and exports read; add a level at stage -1, which is {model.last_layer}."
        )


def check_view_count(objective: Objective, dataset: DataModule, sampler: MaskSampler) -> None:
    """Raise `UserError` if the regularizer compares views of an image and there is only one view."""
    regularizer, num_views = objective.regularizer, dataset.views * sampler.num_contexts + dataset.local_views
    if regularizer and regularizer.needs_several_views and num_views < 2:
        raise UserError(
            f"{type(regularizer).__name__} compares views of an image, but there is only one: set dataset.views=2 or more, "
            "dataset.local_views, or masking.contexts=2 or more."
        )


def warn_of_collapse(objective: Objective, model: HJEPA) -> None:
    """Warn if nothing keeps the features of different images apart: no teacher, no regularizer and no contrastive loss."""
    if model.teacher_is_student and objective.regularizer is None and not objective.compares_images:
        log.warning(
            "loss=%s with teacher=none and regularizer=none: equal features for all images are a perfect solution, so they will "
            "collapse. Choose loss=infonce, a teacher or a regularizer.",
            type(objective.loss).__name__,
        )
