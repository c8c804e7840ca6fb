"""The parts of a run, instantiated from the config groups in the order in which they need one another."""

from dataclasses import dataclass

from torch.optim import Optimizer

from hjepa.config.errors import UserError
from hjepa.config.instantiate import build, build_or_none
from hjepa.config.schema import Config
from hjepa.data.datamodule import Dataset
from hjepa.distributed.device import Hardware
from hjepa.distributed.process_group import World, join
from hjepa.distributed.seeding import generator, seed_global
from hjepa.losses import Objective
from hjepa.masking import Sampler
from hjepa.models.hjepa import HJEPA
from hjepa.models.pretrained import load_model
from hjepa.models.stacked import StackedSampler
from hjepa.optim.schedules import Rates
from hjepa.training.parallel import Copies, Shards
from hjepa.training.teacher import Teacher


@dataclass(frozen=True)
class Parts:
    """What a run is made of, instantiated from the config groups."""

    seed: int
    world: World
    spread: Copies
    hardware: Hardware
    dataset: Dataset
    sampler: Sampler
    model: HJEPA
    objective: Objective
    teacher: Teacher
    optimizer: Optimizer
    schedule: Rates


def assemble(config: Config) -> Parts:
    """Instantiate everything that a step needs; refuses what does not fit together before any data is read."""
    hardware: Hardware = build(config["hardware"])
    world = join(hardware.device.type == "cuda")
    hardware.prepare(world)
    dataset: Dataset = build(config["dataset"])
    refuse_pointless(config, dataset)
    model, sampler, objective = build_model(config)
    refuse_incomparable(objective, dataset, sampler)
    if config["init_from"]:
        load_model(model, config["init_from"])
    teacher: Teacher = build(config["teacher"])
    teacher.attach(model)
    hardware.place(model)
    spread = Shards(world) if hardware.shard else Copies(world)
    spread.divide(model, hardware.device)
    return Parts(
        seed=config["seed"],
        world=world,
        spread=spread,
        hardware=hardware,
        dataset=dataset,
        sampler=sampler,
        model=model,
        objective=objective,
        teacher=teacher,
        optimizer=build(config["optimizer"], model=model),
        schedule=build(config["schedule"]),
    )


def build_model(config: Config) -> tuple[HJEPA, Sampler, Objective]:
    """The model as the seed initialises it, on the CPU, with the sampler of its masks and its objective."""
    seed_global(config["seed"], "init")
    levels = build(config["levels"])
    projector = build_or_none(config["projector"])
    objective = Objective(build(config["loss"]), build_or_none(config["regularizer"]))
    model: HJEPA = build(config["model"], levels=levels, projector=projector, read=objective.read)
    sampler = build(config["masking"], grid=model.grid, pools=levels.pool)
    if model.upper:
        sampler = StackedSampler(sampler, model.upper.stages())
    return model, sampler, objective


def refuse_pointless(config: Config, dataset: Dataset) -> None:
    """Refuse parts that have nothing to do, or do not fit, beside the other parts."""
    regularizer, levels, patch = "_target_" in config["regularizer"], config["levels"]["pool"], config["model"]["patch_size"]
    if not regularizer and not levels:
        raise UserError("levels=none with regularizer=none leaves nothing to minimise; choose levels or a regularizer.")
    if dataset.local_views and not regularizer:
        raise UserError(f"dataset.local_views={dataset.local_views} serves a regularizer only; choose one, or set it to 0.")
    if dataset.local_views and dataset.local_size % patch:
        raise UserError(f"dataset.local_size={dataset.local_size} is no multiple of model.patch_size={patch}; make it one.")


def refuse_incomparable(objective: Objective, dataset: Dataset, sampler: Sampler) -> None:
    """Refuse a regularizer that compares views where an image has one alone."""
    regularizer, contexts = objective.regularizer, sampler(1, generator(0)).context.shape[1]
    if regularizer and regularizer.compares and dataset.views * contexts + dataset.local_views < 2:
        raise UserError(
            f"{type(regularizer).__name__} compares views of an image, and there is one: set dataset.views=2 or more, "
            "dataset.local_views, or masking.contexts=2 or more."
        )
