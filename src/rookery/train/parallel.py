"""Several processes that train one model: who this is, what they tell each other, weights in pieces or in copies."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rookery.models import build
from rookery.registry import families


@dataclass(frozen=True)
class Place:
    """Where this process stands. Without a process group: alone."""

    rank: int = 0
    world: int = 1
    context: int = 1
    """Processes that share the sequences of the same rows, each with a part of their length."""

    @staticmethod
    def here(context: int = 1) -> Place:
        """ValueError where the processes cannot be put into groups of `context`."""
        alone = not (dist.is_available() and dist.is_initialized())
        rank, world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        if world % context:
            raise ValueError(f"context_parallel={context} does not divide the {world} processes of this run")
        return Place(rank, world, context)

    @property
    def first(self) -> bool:
        """Whether it is this process that writes files and talks."""
        return self.rank == 0

    @property
    def groups(self) -> int:
        """Processes, or groups of them, that have rows of their own."""
        return self.world // self.context

    @property
    def group(self) -> int:
        return self.rank // self.context

    @property
    def part(self) -> int:
        """Which part of the sequences is this process's."""
        return self.rank % self.context

    def context_group(self, device: torch.device) -> dist.ProcessGroup:
        """The processes that this one shares sequences with. All processes must call this."""
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device.type, (self.groups, self.context), mesh_dim_names=("rows", "context"))
        return mesh.get_group("context")

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Sums over all processes; what was given where there is one."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        self.add_up([tensor])
        return tensor.tolist()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Puts the sum over all processes into each of the tensors, which are of one type."""
        if self.world == 1:
            return
        joined = torch.cat([tensor.flatten() for tensor in tensors])  # one message in place of many small ones
        dist.all_reduce(joined)
        for tensor, total in zip(tensors, joined.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


def start(local_rank: int) -> None:
    """Joins the processes that torchrun started, over nccl where there are GPUs, taking that of `local_rank`."""
    # a mixer's output is a view here and there; the warning is about writing into it, which the blocks do not
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return
    torch.cuda.set_device(local_rank)
    # gloo for what lies in memory: runs with device=cpu, and words that go with a checkpoint
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", local_rank))


def wait() -> None:
    """Returns when all processes have come here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def stop() -> None:
    """Leaves them, once all have come here."""
    wait()
    dist.destroy_process_group()


def device_of(name: str) -> torch.device:
    """The device that `name` means: "auto" is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    if device.type != "cuda":
        return tree_map_only(Tensor, lambda t: t.to(device), batch)
    # from pinned memory, so that nobody waits for the copy
    return tree_map_only(Tensor, lambda t: t if t.is_cuda else t.pin_memory().to(device, non_blocking=True), batch)


def blocks_of(model: nn.Module) -> Iterable[nn.Module]:
    """The model's blocks, in order; ValueError where it has none that this library knows."""
    if isinstance(blocks := getattr(model, "blocks", None), list):  # of several kinds, in the order of their running
        return blocks
    for name, module in model.named_modules():  # transformers have them one level down, as "model.layers"
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in ("blocks", "layers"):
            return module
    raise ValueError(f"{type(model).__name__} has neither `blocks` nor `layers`: it cannot be cut into pieces")


def units_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered, or computed again, at a time: the mixers of every block.

    Not the block: RWKV's first one holds a norm that is called before it.
    """
    return [
        part
        for block in blocks_of(model)
        for part in block.children()
        if sum(p.numel() for p in part.parameters()) and not isinstance(part, nn.LayerNorm | nn.RMSNorm)
    ]


def shard(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Cuts every weight of a float32 model over all processes, in place (FSDP2).

    Mixers are gathered in `dtype` when they compute; gradients are averaged over the processes in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # inputs are not cast: recurrent states are float32 whatever the model computes in
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units_of(model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    # the rest (embedding, norms, head) stays whole from the forward to the backward pass
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "features")


def learns_in_full(model: nn.Module, trained: nn.Module) -> bool:
    """Whether all weights of the model are trained and nothing else is: then every process can keep a piece of them."""
    return trained is model and all(p.requires_grad for p in model.parameters())


def replicate(*modules: nn.Module) -> None:
    """Gives every process what the first one holds of the modules: copies that stay equal as long as they move alike.

    For adapters, start states and other small parts of a model that stands still: `Place.add_up` sums their gradients.
    """
    for module in dict.fromkeys(modules):
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)


def let_go(model: nn.Module) -> None:
    """A cut model forgets weights that it gathered for a forward pass that no backward pass followed.

    They would be used in the next one, though the pieces may have changed.
    """
    if hasattr(model, "reshard"):
        model.reshard()


def whole(model: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """A copy of a sharded model on the CPU of the first process, None on the others. All processes must call it."""
    weights = {}
    for name, weight in model.state_dict().items():
        full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        if dist.get_rank() == 0:
            weights[name] = full.to("cpu", dtype)
    if dist.get_rank() != 0:
        return None
    copy = build(families()[model.family], model.config).to(dtype)
    copy.load_state_dict(weights)
    return copy
