"""What a call costs the host: `python -m bench.host`, microseconds of a forward and its backward.

Tensors are tiny, so that Python, the dispatcher, autograd and the binding are all there is to see.
Calls follow each other as the layers of a model do, with one backward for all: what autograd costs
once per step is spread over them. "nothing" is an autograd function that only allocates: what
PyTorch itself takes. The smallest of many, taken in turns: whatever else runs only adds.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmkernels import ops

Pair = tuple[Tensor, Tensor]
CALLS = 32


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Pair:
        return torch.empty_like(q), torch.empty_like(k)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Pair:
        return torch.empty_like(dq), torch.empty_like(dk)


def steps(device: str) -> dict[str, Callable[[Tensor, Tensor], Pair]]:
    """Each maps q and k of one token and one head to others of that shape."""
    positions = torch.zeros((3, 1), dtype=torch.int64, device=device)
    one, two = positions[0], positions[:2]
    table = torch.ones((1, 8), device=device)
    nothing: Any = Nothing.apply
    return {
        "nothing": nothing,
        "rope": lambda q, k: ops.rope(q, k, one),
        "mrope": lambda q, k: ops.mrope(q, k, positions, [2, 1, 1]),
        "vision_rope": lambda q, k: ops.vision_rope(q, k, two),
        "rope_from_tables": lambda q, k: ops.rope_from_tables(q, k, table, table),
    }


def microseconds(device: str = "cpu", rounds: int = 1000) -> dict[str, float]:
    """By name, forward and backward of one call."""
    leaves = [torch.ones((1, 1, 8), device=device, requires_grad=True) for _ in range(2)]

    def chain(step: Callable[[Tensor, Tensor], Pair]) -> None:
        q, k = leaves
        for _ in range(CALLS):
            q, k = step(q, k)
        torch.autograd.grad((q, k), leaves, (leaves[0].detach(), leaves[1].detach()))

    runs = {name: functools.partial(chain, step) for name, step in steps(device).items()}
    seconds = dict.fromkeys(runs, math.inf)
    for _ in range(rounds):
        for name, run in runs.items():
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return {name: best / CALLS * 1e6 for name, best in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    figures = microseconds(args.device)
    for name, us in figures.items():
        print(f"{name:20}{us:8.1f} us")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
