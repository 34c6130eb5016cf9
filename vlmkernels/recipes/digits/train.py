"""Trains the digits model from nothing: single digits first, then several on a canvas.

Without the first stage the model has to find out at once where digits are and what they look
like, and stays at chance for a long time (docs/digits.md shows the curves).

A step is a function of the weights, the optimizer state and its own number, since the examples of
step n are drawn from (seed, n). So a run that was killed and resumed ends with the same weights.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmkernels.models import load_processor
from vlmkernels.models.checkpoint import CONFIG, read_json, save_checkpoint
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLConfig, Qwen2VLProcessor

from .blueprint import write_blueprint
from .data import MAX_DIGITS, Example, load_scans, training_batch
from .evaluate import prompt

STATE = "training_state.safetensors"
SETTINGS = "training.json"  # what the weights of a finished run were made with


@dataclass(frozen=True)
class Settings:
    """What decides the weights that come out; a resumed run must have the same."""

    steps: int = 3000
    single_share: float = 0.15  # of the steps show one digit per canvas
    batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 0

    def learning_rate(self, step: int) -> float:
        """lr * min(1, (step + 1) / warmup), then a cosine down to 2 % of lr at the last step."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * cosine)

    def most_digits(self, step: int) -> int:
        return 1 if step < self.single_share * self.steps else MAX_DIGITS


def collate(processor: Qwen2VLProcessor, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Model arguments with labels on the answers and the token that ends them, nowhere else."""
    answers = [example.answer + "<|im_end|>" for example in examples]
    texts = [prompt(processor, e.question) + a for e, a in zip(examples, answers, strict=True)]
    images = [example.canvas.pixels for example in examples]
    batch = processor(texts, images, padding_side="right")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    answer_lengths = torch.tensor([len(processor.tokenizer.encode(a)) for a in answers])
    from_end = mask.sum(dim=1, keepdim=True) - torch.arange(ids.shape[1])
    is_answer = (from_end > 0) & (from_end <= answer_lengths[:, None])
    return batch | {"labels": ids.masked_fill(~is_answer, -100)}


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Matrices N(0, 0.5 / fan_in), embeddings N(0, 0.02^2), biases 0, norm weights 1.

    The published 0.02 for all is made for widths in the thousands; at this width the signal is
    lost in it, and training stays at chance (docs/digits.md).
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            std = 0.02 if "embed_tokens" in name else math.sqrt(0.5 / weight[0].numel())
            weight.normal_(std=std, generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)


class Run:
    """A training run in the folder `out`, which ends as a checkpoint in the published layout."""

    def __init__(self, out: Path, settings: Settings, *, resume: bool = False) -> None:
        """ValueError, and nothing written, when `out` holds what this run would destroy, or with
        `resume` when it holds no run of these settings."""
        if resume:
            _check_resumable(out, settings)
        elif (out / STATE).is_file() or (out / CONFIG).is_file():
            raise ValueError(f"out: expected a new folder, or --resume, got {out} with a model")
        self.out, self.settings, self.step = out, settings, 0
        self.scans, _ = load_scans()
        write_blueprint(out)
        self.processor = load_processor(out)
        self.model = Qwen2VL(Qwen2VLConfig.from_dict(read_json(out / CONFIG)))
        initialise(self.model, settings.seed)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=True,
        )
        if resume:
            self._load_state()

    def advance(self) -> float:
        """One step; -> its loss."""
        s = self.settings
        examples = training_batch(s.seed, self.step, self.scans, s.batch, s.most_digits(self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate(self.step)
        loss = self.model(**collate(self.processor, examples)).loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def save(self) -> None:
        """Writes weights, optimizer state and step; a kill at any moment leaves a whole file."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, weight in self.model.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.optimizer.state[weight][moment]
        metadata = {"step": str(self.step), "settings": json.dumps(asdict(self.settings))}
        save_file(tensors, self.out / (STATE + ".part"), metadata)
        os.replace(self.out / (STATE + ".part"), self.out / STATE)

    def _load_state(self) -> None:
        with safe_open(self.out / STATE, framework="pt") as state:
            self.step = int(state.metadata()["step"])
            for name, weight in self.model.named_parameters():
                weight.data.copy_(state.get_tensor(f"model.{name}"))
                self.optimizer.state[weight] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": state.get_tensor(f"exp_avg.{name}"),
                    "exp_avg_sq": state.get_tensor(f"exp_avg_sq.{name}"),
                }

    def export(self) -> None:
        """Writes the weights in bfloat16 and removes the saved state: `out` is a checkpoint."""
        weights = {k: v.to(torch.bfloat16) for k, v in self.model.state_dict().items()}
        save_checkpoint(self.out, weights, {SETTINGS: asdict(self.settings)})
        (self.out / STATE).unlink(missing_ok=True)


def _check_resumable(out: Path, settings: Settings) -> None:
    if not (out / STATE).is_file():
        raise ValueError(f"resume: expected {out / STATE}, found none")
    with safe_open(out / STATE, framework="pt") as state:
        saved = json.loads(state.metadata()["settings"])
    if saved != asdict(settings):
        raise ValueError(f"resume: expected the run's settings {saved}")
