"""How a model is spread over the processes: a copy in each (DDP), or divided among them (FSDP2), so that each holds a part of
every parameter, its gradient and its optimizer state, and a block as a whole only while it computes it.
"""

from contextlib import AbstractContextManager, nullcontext
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

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class DDPStrategy:
    """A copy in each process; a backward pass makes the gradients the mean over all."""

    def __init__(self, world: World) -> None:
        self.world = world

    def divide(self, model: HJEPA, device: torch.device) -> None:
        """Prepare the model, on its device, before its optimizer is made."""

    def wrap(self, model: HJEPA, optimizer: Optimizer) -> nn.Module:
        """What to call for a forward pass."""
        if self.world.size == 1:
            return model
        device = next(model.parameters()).device
        modern = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        alike: dict[str, Any] = {"forward_sync_buffers" if modern else "broadcast_buffers": False}  # all have the same buffers
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **alike)

    def no_sync(self, net: nn.Module) -> AbstractContextManager[None]:
        """Backward passes that add to each process' own gradients, for a later one to share."""
        return net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()

    def measures(self) -> bool:
        """Whether this process takes part in measuring."""
        return self.world.main

    def state_dict(self, model: HJEPA, optimizer: Optimizer) -> State:
        """The states of both for a checkpoint, whole ones on the main process."""
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def load_state_dict(self, model: HJEPA, optimizer: Optimizer, state: State) -> None:
        """Go on from a checkpoint."""
        check_same_strategy(state, named=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])


class FSDPStrategy(DDPStrategy):
    """Divided among the processes. All of them measure, since none has the whole model.

    Raises:
        UserError: there is one process only, or the optimizer needs whole matrices.
    """

    def divide(self, model: HJEPA, device: torch.device) -> None:
        if self.world.size == 1:
            raise UserError("hardware.shard=true needs several processes to divide the model among; set hardware.processes.")
        mesh = init_device_mesh(device.type, (self.world.size,))
        for block in model.blocks():
            fully_shard(block, mesh=mesh)
        parts = {model.student, model.teacher, model.predictor, model.upper, model.fusion, *model.projectors.values()}
        for part in parts:  # each is called on its own
            if part is not None and any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
        for encoder in {model.student, model.teacher}:
            register_fsdp_forward_method(encoder, "features")

    def wrap(self, model: HJEPA, optimizer: Optimizer) -> nn.Module:
        if not isinstance(optimizer, AdamW):
            raise UserError("hardware.shard=true divides every matrix among the processes and goes with optimizer=adamw only.")
        return model

    def measures(self) -> bool:
        return True

    def state_dict(self, model: HJEPA, optimizer: Optimizer) -> State:
        return {
            "model": get_model_state_dict(model, options=WHOLE),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=WHOLE),
        }

    def load_state_dict(self, model: HJEPA, optimizer: Optimizer, state: State) -> None:
        check_same_strategy(state, named=True)
        set_model_state_dict(model, state["model"], options=WHOLE)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)


def check_same_strategy(state: State, named: bool) -> None:
    """A divided model's optimizer state goes by names, others' by numbers: one does not serve the other."""
    if named != any(isinstance(key, str) for key in state["optimizer"].get("state", ())):
        raise UserError(
            f"The checkpoint is of a run with hardware.shard={str(not named).lower()}; continue it so, or start another run "
            "from its weights with init_from=."
        )


def full_tensor(value: Tensor) -> Tensor:
    """A divided tensor as a whole, in all processes; others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value
