"""A model over the processes of torchrun: sharded by FSDP2, read by the first, gathered to it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vlmkernels.models import load
from vlmkernels.models.pretrained import Pretrained


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined() -> Iterator[torch.device]:
    """The device of this process; under torchrun it is one of a group inside."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        yield device()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Of the logits, which nothing changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    yield device()
    dist.destroy_process_group()  # not after an error: others would be waited for


def device() -> torch.device:
    """The current GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(value: Tensor | float) -> float:
    """The sum over all ranks."""
    x = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    if dist.is_initialized():
        dist.all_reduce(x)
    return float(x)


def average_grads(parameters: Sequence[nn.Parameter]) -> None:
    """Of parameters that every rank has whole."""
    for parameter in parameters if dist.is_initialized() else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


def load_on_first(path: Path) -> Pretrained:
    """The model of a checkpoint in fp32 on rank 0, its shapes alone on the others."""
    model: Pretrained | None = load(path, dtype=torch.float32) if rank() == 0 else None
    if world_size() == 1:
        assert model is not None
        return model
    what: list[Any] = [(type(model), getattr(model, "config", None))]
    dist.broadcast_object_list(what)
    kind, config = what[0]
    return kind.on_meta(config) if model is None else model


def spread(model: Pretrained, to: torch.device) -> Pretrained:
    """The model on a device; over several ranks a shard of every layer, with rank 0's weights.

    A layer is what a ModuleList holds; it is gathered when it runs.
    """
    if world_size() == 1:
        return model.to(to)
    weights = dict(model.state_dict()) if rank() == 0 else {}
    model.to("meta")
    for layer in layers(model):
        # Of T5's first layers others read a table: they stay with what is outside of layers.
        if not any(isinstance(module, nn.Embedding) for module in layer.modules()):
            fully_shard(layer)
    scalars = {p for p in model.parameters() if p.ndim == 0}  # the same on every rank
    fully_shard(model, ignored_params=scalars)
    model.to_empty(device=to)
    whole_on_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=whole_on_first)
    return model


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """What the outermost ModuleLists hold."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else layers(child)


def gathered(model: Pretrained, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights on the CPU of rank 0; nothing on the others."""
    whole = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == 0:
            whole[name] = tensor.to("cpu", dtype if tensor.is_floating_point() else None)
    return whole
