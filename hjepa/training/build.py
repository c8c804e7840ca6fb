"""The parts of a run, instantiated from the config groups in the order in which they need one another."""

from dataclasses import dataclass

from torch.optim import Optimizer

from hjepa.config.errors import UserError
from hjepa.config.instantiate import build, build_or_none
from hjepa.config.schema import Config
from hjepa.data.datamodule import DataModule
from hjepa.distributed.device import Hardware
from hjepa.distributed.process_group import World, init_process_group
from hjepa.distributed.seeding import generator, seed_global
from hjepa.losses import Objective
from hjepa.masking import MaskSampler
from hjepa.models.hjepa import HJEPA
from hjepa.models.pretrained import load_model
from hjepa.models.stacked import StackedMaskSampler
from hjepa.optim.schedules import OptimizerSchedules
from hjepa.training.parallel import DDPStrategy, FSDPStrategy
from hjepa.training.teacher import TeacherUpdate


@dataclass(frozen=True)
class Components:
    """What a run is made of, instantiated from the config groups."""

    seed: int
    world: World
    strategy: DDPStrategy
    hardware: Hardware
    dataset: DataModule
    sampler: MaskSampler
    model: HJEPA
    objective: Objective
    teacher: TeacherUpdate
    optimizer: Optimizer
    schedule: OptimizerSchedules


def build_components(config: Config) -> Components:
    """Instantiate everything that a step needs; refuses what does not fit together before any data is read."""
    hardware: Hardware = build(config["hardware"])
    world = init_process_group(hardware.device.type == "cuda")
    hardware.prepare(world)
    dataset: DataModule = build(config["dataset"])
    check_useful(config, dataset)
    model, sampler, objective = build_model(config)
    check_view_count(objective, dataset, sampler)
    if config["init_from"]:
        load_model(model, config["init_from"])
    teacher: TeacherUpdate = build(config["teacher"])
    teacher.attach(model)
    hardware.place(model)
    strategy = FSDPStrategy(world) if hardware.shard else DDPStrategy(world)
    strategy.divide(model, hardware.device)
    return Components(
        seed=config["seed"],
        world=world,
        strategy=strategy,
        hardware=hardware,
        dataset=dataset,
        sampler=sampler,
        model=model,
        objective=objective,
        teacher=teacher,
        optimizer=build(config["optimizer"], model=model),
        schedule=build(config["schedule"]),
    )


def build_model(config: Config) -> tuple[HJEPA, MaskSampler, Objective]:
    """The model as the seed initializes it, on the CPU, with the sampler of its masks and its objective."""
    seed_global(config["seed"], "init")
    levels = build(config["levels"])
    projector = build_or_none(config["projector"])
    objective = Objective(build(config["loss"]), build_or_none(config["regularizer"]))
    model: HJEPA = build(config["model"], levels=levels, projector=projector, num_regularized=objective.num_regularized_levels)
    sampler = build(config["masking"], grid=model.grid, pools=levels.pool)
    if model.upper:
        sampler = StackedMaskSampler(sampler, model.upper.stacked_levels())
    return model, sampler, objective


def check_useful(config: Config, dataset: DataModule) -> None:
    """Refuse parts that have nothing to do, or do not fit, beside the other parts."""
    regularizer, levels, patch = "_target_" in config["regularizer"], config["levels"]["pool"], config["model"]["patch_size"]
    if not regularizer and not levels:
        raise UserError("levels=none with regularizer=none leaves nothing to minimize; choose levels or a regularizer.")
    if dataset.local_views and not regularizer:
        raise UserError(f"dataset.local_views={dataset.local_views} serves a regularizer only; choose one, or set it to 0.")
    if dataset.local_views and dataset.local_size % patch:
        raise UserError(f"dataset.local_size={dataset.local_size} is no multiple of model.patch_size={patch}; make it one.")


def check_view_count(objective: Objective, dataset: DataModule, sampler: MaskSampler) -> None:
    """Refuse a regularizer that compares views where an image has one alone."""
    regularizer, contexts = objective.regularizer, sampler(1, generator(0)).context.shape[1]
    if regularizer and regularizer.compares and dataset.views * contexts + dataset.local_views < 2:
        raise UserError(
            f"{type(regularizer).__name__} compares views of an image, and there is one: set dataset.views=2 or more, "
            "dataset.local_views, or masking.contexts=2 or more."
        )
