"""One trainer for all recipes: a stage's parameters, AdamW, and runs that survive a kill.

A step is a function of the weights, the optimizer state and its own number, since its batches and
its random numbers are drawn from (seed, step). So a run that was killed and resumed on as many
ranks ends with the same bits.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from vlmkernels.models.checkpoint import CONFIG, read_json, write_json
from vlmkernels.models.pretrained import Pretrained

from . import ranks
from .settings import Settings

STATE = "training_state"  # a folder for each save, until the run is finished
SETTINGS = "training.json"  # what the weights of a finished run were made with
METRICS = "metrics.jsonl"  # a line a step
Batch = dict[str, Tensor]
Metrics = dict[str, float]


class Objective(Protocol):
    """What is minimised: a sum over items, by the number of them in the whole step."""

    splits: bool  # into micro-batches whose losses add up

    def count(self, batch: Batch) -> int: ...
    def loss(self, model: nn.Module, batch: Batch, num_items: int) -> Tensor: ...
    def after_step(self, model: nn.Module) -> None: ...


class NextToken:
    """Cross entropy of the labels; every one in a step weighs alike, whatever row it stands in."""

    splits = True

    def count(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    def loss(self, model: nn.Module, batch: Batch, num_items: int) -> Tensor:
        loss: Tensor = model(**batch, num_items_in_batch=num_items).loss
        return loss

    def after_step(self, model: nn.Module) -> None: ...


class Trainer:
    """A run in the folder `out`, which ends as a checkpoint in the published layout.

    make_model: called once `out` is found fit.
    batches: of a step's number, this rank's micro-batches of that step and of all later ones.
    origin: what else decides the weights, by name; a resumed run must have the same.
    """

    def __init__(
        self,
        make_model: Callable[[], Pretrained],
        settings: Settings,
        out: Path,
        batches: Callable[[int], Iterator[Sequence[Batch]]],
        *,
        objective: Objective | None = None,
        device: torch.device | None = None,
        resume: bool = False,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        """ValueError, and nothing written, when `out` holds what this run would destroy, or with
        `resume` when it holds no run of these settings, this origin and this model."""
        saved, self.origin = _latest(out), {**asdict(settings), **(origin or {})}
        if resume:
            _check_resumable(out, saved, self.origin)
        elif saved is not None or (out / CONFIG).is_file():
            raise ValueError(f"out: expected a new folder, or --resume, got {out} with a model")
        self.out, self.settings, self.step = out, settings, 0
        self.objective = objective or NextToken()
        model = make_model()
        freeze(model, settings.frozen)
        self.origin["model"] = fingerprint(model)
        if saved is not None:
            _check_resumable(out, saved, {"model": self.origin["model"]})
        if settings.bf16:
            halve_frozen(model)
        model.gradient_checkpointing_enable(settings.gradient_checkpointing)
        self.kind, self.device = type(model), device or torch.device("cpu")
        self.model = ranks.spread(model, self.device)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = adamw(list(self.trained.values()), settings)
        if saved is not None:
            self.step = int(read_json(saved / SETTINGS)["step"])
            with _maybe_alone():
                load(self._tensors(), checkpoint_id=saved)
        self._batches = batches
        self._coming: Iterator[Sequence[Batch]] | None = None

    def advance(self) -> Metrics:
        """One step."""
        start, s = time.perf_counter(), self.settings
        if self._coming is None:
            self._coming = self._batches(self.step)
        batches = next(self._coming)
        torch.manual_seed(hash((s.seed, self.step, ranks.rank())) % 2**63)  # of dropout
        rate = s.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        num_items = int(ranks.total(sum(self.objective.count(b) for b in batches)))
        if num_items == 0:
            raise ValueError(f"step {self.step}: expected labels in the batch, got none")
        loss = ranks.total(sum(self._backward(batch, num_items) for batch in batches))
        if not math.isfinite(loss):
            raise RuntimeError(f"step {self.step}: the loss became {loss}")
        # Temperatures are no part of it: over ranks they are no shards, and FSDP leaves them alone.
        weights = [p for p in self.trained.values() if p.ndim > 0]
        grad = nn.utils.clip_grad_norm_(weights, s.max_grad_norm)
        norm = float(grad.full_tensor() if isinstance(grad, DTensor) else grad)
        if not math.isfinite(norm):  # weights that are no numbers must never be saved
            raise RuntimeError(f"step {self.step}: the gradient's norm became {norm}")
        ranks.average_grads([p for p in self.trained.values() if p.ndim == 0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step(self.model)
        self.step += 1
        return {
            "step": self.step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "items": num_items,
            "seconds": time.perf_counter() - start,
        }

    def _backward(self, batch: Batch, num_items: int) -> Tensor:
        """Adds to the gradients; -> this batch's part of the loss."""
        moved = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            loss = self.objective.loss(self.model, moved, num_items)
        # FSDP averages gradients over the ranks; the loss is a sum over them.
        (loss * ranks.world_size()).backward()
        return loss.detach()

    def fit(self, save_every: int, report: Callable[[Metrics], None]) -> None:
        """All steps that are left; metrics of each are written and reported."""
        lines = self.out / METRICS
        if ranks.rank() == 0:
            _keep_lines(lines, self.step)
        while self.step < self.settings.steps:
            metrics = self.advance()
            if ranks.rank() == 0:
                with lines.open("a") as file:
                    file.write(json.dumps(metrics) + "\n")
            if self.step % save_every == 0 or self.step == self.settings.steps:
                self.save()
            report(metrics)

    def save(self) -> None:
        """Writes weights, optimizer state and step; a kill at any moment leaves a whole save."""
        folder = self.out / STATE / f"step_{self.step}"
        if folder.exists():
            return
        part = folder.with_suffix(".part")
        if ranks.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write_json(part / SETTINGS, {"step": self.step, **self.origin})
        ranks.barrier()
        with _maybe_alone():
            save(self._tensors(), checkpoint_id=part)
        if ranks.rank() == 0:
            os.replace(part, folder)
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other)
        ranks.barrier()

    def _tensors(self) -> dict[str, Tensor]:
        """All that a step changes, as views: to load into them is to load the run."""
        tensors = {}
        for name, parameter in self.trained.items():
            tensors[f"weight.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def export(self) -> None:
        """Writes the weights in bfloat16 and removes the saved state: `out` is a checkpoint."""
        weights = ranks.gathered(self.model, torch.bfloat16)
        if ranks.rank() == 0:
            whole = self.kind.on_meta(self.model.config)
            whole.load_state_dict(weights, assign=True)
            if hasattr(self.model, "generation_config"):
                whole.generation_config = self.model.generation_config
            whole.save_pretrained(self.out)
            write_json(self.out / SETTINGS, asdict(self.settings))
            shutil.rmtree(self.out / STATE, ignore_errors=True)
        ranks.barrier()


def freeze(model: Pretrained, frozen: str) -> None:
    """Parameters whose names begin as `frozen` says get no gradient; modules without any evaluate.

    ValueError for a pattern of no name or of all.
    """
    found = {name for name, _ in model.named_parameters() if frozen and re.match(frozen, name)}
    if bool(frozen) != bool(found) or len(found) == len(list(model.parameters())):
        raise ValueError(
            f"frozen: expected the beginning of some parameters' names, got {frozen!r}, which is "
            f"that of {len(found)}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in found)
    for module in model.modules():  # outer ones first
        module.train(any(p.requires_grad for p in module.parameters()))


def fingerprint(model: Pretrained) -> int:
    """Of rank 0's model: of its config, its parameters' shapes, and the bits of those that are
    frozen, which no save has."""
    if ranks.rank() > 0:
        return int(ranks.total(0))
    parts = [repr(getattr(model, "config", None))]
    for name, p in model.named_parameters():
        bits = 0 if p.requires_grad else int(p.detach().float().view(torch.int32).sum())
        parts.append(f"{name} {tuple(p.shape)} {bits}")
    return int(ranks.total(zlib.crc32("\n".join(parts).encode())))


def halve_frozen(model: Pretrained) -> None:
    """Frozen matrices in bfloat16, which autocast would make of them in every pass; the norms stay,
    and with them the residual stream."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.bfloat16)


def adamw(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """AdamW whose weight decay is for matrices alone, with its state in place from the start."""
    groups = [[p for p in parameters if min(p.ndim, 2) == ndim] for ndim in range(3)]
    optimizer = torch.optim.AdamW(
        [
            {"params": group, "weight_decay": settings.weight_decay if group[0].ndim > 1 else 0.0}
            for group in groups
            if group
        ],
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


@contextmanager
def _maybe_alone() -> Iterator[None]:
    """Without the warning that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _latest(out: Path) -> Path | None:
    """The folder of the last save that was finished."""
    saves = [p for p in (out / STATE).glob("step_*") if p.suffix != ".part"]
    return max(saves, key=lambda p: int(p.name.removeprefix("step_")), default=None)


def _check_resumable(out: Path, saved: Path | None, origin: Mapping[str, Any]) -> None:
    """ValueError for what differs between a save and the run that shall go on from it."""
    if saved is None:
        raise ValueError(f"resume: expected a save in {out / STATE}, found none")
    before: dict[str, Any] = read_json(saved / SETTINGS)
    differs = [name for name, value in origin.items() if before.get(name) != value]
    if differs:
        pairs = (f"{name} {before.get(name)!r}, got {origin[name]!r}" for name in differs)
        raise ValueError(f"resume: expected the run's {'; '.join(pairs)}")


def _keep_lines(file: Path, last: int) -> None:
    """Of a file of metrics those up to a step: what came after the last save is done again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.is_file() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last]
    file.write_text("".join(line + "\n" for line in kept))
