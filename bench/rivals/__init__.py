"""Rivals: other people's code for the same function, used where it can be imported.

A file of this package is named as a room and holds plain functions with the keyword arguments of
`ops.<function>`, decorated with `@rival`. One that doesn't cover a case raises NotSupportedError;
what it needs is imported when it is first used.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.case import Case, forward, gradient, lazily
from bench.measure import NotSupportedError

__all__ = ["NotSupportedError", "Rival", "available", "rival", "variants"]


@dataclass(frozen=True)
class Rival:
    name: str
    function: str  # of vlmkernels.ops
    module: str  # must be importable
    call: Callable[..., Any]
    needs_cuda: bool = False


ANY = "*"
REGISTRY: list[Rival] = [Rival("torch.compile", ANY, "torch", torch.compile)]


def rival(
    function: str, name: str, module: str = "torch", *, needs_cuda: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a rival of ops.<function>; `module` names what it is made of."""

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        REGISTRY.append(Rival(name, function, module, call, needs_cuda))
        return call

    return register


def available(device: str) -> list[Rival]:
    """The rivals whose module is here and runs on this device."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    cuda = device.startswith("cuda")
    return [r for r in REGISTRY if _importable(r.module) and (cuda or not r.needs_cuda)]


def variants(case: Case, rivals: list[Rival]) -> dict[str, Callable[[], Any]]:
    """name -> function without arguments, as in Case.variants, of the rivals of this case."""
    bind = gradient if case.direction == "bwd" else forward
    found = {r.name: r.call for r in rivals if r.function == case.function}
    if case.eager is not None and any(r.function == ANY for r in rivals):
        torch.compiler.reset()  # every case starts with an empty cache: shapes stay static
        found["torch.compile"] = torch.compile(case.eager, dynamic=False)
    return {name: lazily(bind, call, case.inputs) for name, call in found.items()}


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
