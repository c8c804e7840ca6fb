"""The parts of a run, instantiated from the config groups in the order in which they need one another."""

from hjepa.config import Config, build
from hjepa.hardware import Hardware
from hjepa.losses import Objective
from hjepa.model import HJEPA
from hjepa.rng import seed_global
from hjepa.trainer import Parts


def assemble(config: Config) -> Parts:
    """Instantiate everything that a step needs; refuses what does not fit together before any data is read."""
    hardware: Hardware = build(config["hardware"])
    hardware.prepare()
    dataset = build(config["dataset"])
    seed_global(config["seed"], "init")
    levels = build(config["levels"])
    model: HJEPA = build(config["model"], levels=levels)
    sampler = build(config["masking"], grid=model.grid, pools=levels.pool)
    hardware.place(model)
    return Parts(
        seed=config["seed"],
        hardware=hardware,
        dataset=dataset,
        sampler=sampler,
        model=model,
        objective=Objective(build(config["loss"]), build(config["regularizer"]) if config["regularizer"] else None),
        teacher=build(config["teacher"]),
        optimizer=build(config["optimizer"], model=model),
        lr=build(config["schedule"]["lr"]),
        weight_decay=build(config["schedule"]["weight_decay"]),
    )
