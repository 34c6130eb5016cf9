"""What decides the weights that a training run ends with."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vlmkernels.models.fields import (
    COUNT,
    FRACTION,
    INDEX,
    NOT_NEGATIVE,
    POSITIVE,
    Kind,
    expect,
    expect_fields,
)

S = TypeVar("S", bound="Settings")
COUNT_OR_NONE = Kind("a positive integer", lambda x: x is None or COUNT.holds(x))


@dataclass(frozen=True)
class Settings:
    """AdamW, warm-up and a cosine. A resumed run must have the same; recipes add their own."""

    steps: int
    batch: int  # examples of a step, over all ranks
    lr: float
    warmup: float = 0.0  # steps; below 1 a share of them
    min_lr: float = 0.0  # share of lr that the last step would have
    weight_decay: float = 0.0  # of matrices; biases and norm weights have none
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 0
    frozen: str = ""  # regular expression that the names of parameters begin with that stay
    micro_batch: int | None = None  # of a forward pass on a rank, at most; None: its share
    bf16: bool = True  # autocast; weights that are trained stay in fp32
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("min_lr", "beta1", "beta2"), FRACTION)
        rest = dict.fromkeys(("warmup", "weight_decay"), NOT_NEGATIVE)
        expect_fields(self, **shares, **rest, seed=INDEX, micro_batch=COUNT_OR_NONE)
        try:
            re.compile(self.frozen)
        except re.error as error:
            raise ValueError(f"frozen: expected a regular expression: {error}") from error

    def learning_rate(self, step: int) -> float:
        """lr (step + 1) / warmup, then lr (m + (1 - m) (1 + cos(pi t)) / 2), m = min_lr, t < 1."""
        warmup = self.warmup if self.warmup >= 1 else math.ceil(self.warmup * self.steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))
        return self.lr * (self.min_lr + (1 - self.min_lr) * cosine)


def read_settings(
    kind: type[S], published: Mapping[str, Any], file: Path | None, num_examples: int
) -> S:
    """`published` fields, with those of a TOML file in their place; `epochs` stands for `steps`.

    Raises ValueError for a file that is none, and for a field that is unknown or of a wrong kind.
    """
    given = {} if file is None else _read_toml(file)
    known = {"epochs", *(f.name for f in dataclasses.fields(kind))}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"{file}: expected fields out of {sorted(known)}, got {unknown}")
    if given.keys() >= {"epochs", "steps"}:
        raise ValueError(f"{file}: expected epochs or steps, got both")
    fields: dict[str, Any] = {**published, **given}
    epochs = expect("epochs", fields.pop("epochs", 1), POSITIVE)
    if ("steps" not in fields or "epochs" in given) and COUNT.holds(fields["batch"]):
        fields["steps"] = math.ceil(epochs * num_examples / fields["batch"])
    return kind(**fields)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"config: expected a TOML file, found none at {file}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected TOML: {error}") from error
