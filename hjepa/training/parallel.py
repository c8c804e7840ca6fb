"""Parallel training: a copy of the model in each process (DDP), or the model divided among the processes (FSDP2).

Under FSDP2, each process holds a part of every parameter, its gradient and its optimizer state, and gathers a complete block only
while it computes the block.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from hjepa.config.errors import UserError
from hjepa.distributed.process_group import World
from hjepa.models.hjepa import HJEPA

State = dict[str, Any]

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class DDPStrategy:
    """A copy of the model in each process; the backward pass averages the gradients over the processes."""

    def __init__(self, world: World) -> None:
        self.world = world

    def shard(self, model: HJEPA, device: torch.device) -> None:
        """Divide the model, which is on its device, before its optimizer is created; DDP leaves it whole."""

    def wrap(self, model: HJEPA, optimizer: Optimizer) -> nn.Module:
        """Return the module to call for a forward pass, and keep model and optimizer for `state_dict`."""
        self.model, self.optimizer = model, optimizer
        if self.world.size == 1:
            return model
        device = next(model.parameters()).device
        # All processes have the same buffers (see `hjepa.distributed.batch_norm`). Newer versions of torch renamed the option.
        renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **options)

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """Accumulate gradients in each process without averaging them, as DDP's `no_sync`."""
        return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()

    def measures(self) -> bool:
        """Return whether this process takes part in measurements of the model."""
        return self.world.main

    def state_dict(self) -> State:
        """Return the complete states of model and optimizer; every process must call this, and the main process saves them."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Restore a state returned by `state_dict`."""
        check_same_strategy(state, sharded=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class FSDPStrategy(DDPStrategy):
    """The model divided among the processes; all of them take part in measurements, since none holds the complete model.

    Raises:
        UserError: There is only one process, or the optimizer needs complete matrices.
    """

    def shard(self, model: HJEPA, device: torch.device) -> None:
        if self.world.size == 1:
            raise UserError("hardware.shard=true needs several processes to divide the model among; set hardware.processes.")
        model.to(memory_format=torch.contiguous_format)  # FSDP2 does not divide weights in channels_last format
        mesh = init_device_mesh(device.type, (self.world.size,))
        for block in model.blocks():
            fully_shard(block, mesh=mesh)
        heads = [*model.projectors.values(), *model.student_heads.values(), *model.teacher_heads.values()]
        modules = {model.student, model.teacher, model.predictor, model.matching, model.upper, model.fusion, *heads}
        for module in modules:  # each of them is called on its own
            if module is not None and any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for encoder in {model.student, model.teacher}:
            register_fsdp_forward_method(encoder, "features")
        if model.matching is not None:
            register_fsdp_forward_method(model.matching, "map")

    def wrap(self, model: HJEPA, optimizer: Optimizer) -> nn.Module:
        if not isinstance(optimizer, AdamW):
            raise UserError("hardware.shard=true divides every matrix among the processes, which needs optimizer=adamw.")
        self.model, self.optimizer = model, optimizer
        return model

    def measures(self) -> bool:
        return True

    def state_dict(self) -> State:
        return {
            "model": get_model_state_dict(self.model, options=FULL_STATE),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=FULL_STATE),
        }

    def load_state_dict(self, state: State) -> None:
        check_same_strategy(state, sharded=True)
        weights = {key: value for key, value in state["model"].items() if key not in shared_names(self.model)}
        set_model_state_dict(self.model, weights, options=replace(FULL_STATE, strict=False))
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=FULL_STATE)


def shared_names(model: nn.Module) -> set[str]:
    """Return the further names of tensors that a model holds under several, such as those of a student that is its own teacher.

    `set_model_state_dict` handles each tensor under its first name only.
    """
    states = model.named_parameters, model.named_buffers
    every, first = ({name for state in states for name, _ in state(remove_duplicate=once)} for once in (False, True))
    return every - first


def check_same_strategy(state: State, sharded: bool) -> None:
    """Raise `UserError` if a checkpoint was saved with the other strategy.

    FSDP keys the optimizer state by parameter name and DDP by parameter number, so that neither can load the other's.
    """
    if sharded != any(isinstance(key, str) for key in state["optimizer"].get("state", ())):
        raise UserError(
            f"The checkpoint belongs to a run with hardware.shard={str(not sharded).lower()}; continue it with that setting, or "
            "start another run from its weights with init_from=."
        )


def full_tensor(value: Tensor) -> Tensor:
    """Return a tensor that is divided among the processes as a complete one; return any other tensor unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value
