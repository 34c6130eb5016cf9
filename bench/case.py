"""What a bench file gives: cases, each a set of variants that compute the same thing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One line of the bench table.

    variants: name -> function without arguments, whose results must agree; "vlmkernels" is ours and
    "eager" the plain PyTorch code that it replaces. bytes: what must be read and written at least.
    flops: multiply and add count as two.
    """

    op: str
    shape: str  # a named shape and its sizes, e.g. "qwen2vl_7b 4096x28x128"
    dtype: str
    direction: str  # "fwd" | "bwd" | "fwd+bwd"
    bytes: int
    flops: int
    variants: dict[str, Callable[[], Any]] = field(repr=False)
