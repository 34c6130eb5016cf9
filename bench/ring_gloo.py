"""ring_attention against ring-attention-pytorch over Gloo, on CPUs: `python -m bench.ring_gloo`.

Both run in the same processes and take turns; a turn is forward and backward of one causal layer,
all ranks starting together. Writes bench/results/ring_gloo.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bench.record import RESULTS, new_run
from vlmkernels.distributed import ContextPlan, ring_attention

SIZES = ((1024, 8, 64), (4096, 8, 64))  # tokens of the whole sequence, heads, head_dim
LAYOUTS = ("contiguous", "zigzag")  # theirs is contiguous


def _turn(function: Callable[..., Tensor], parts: list[Tensor]) -> float:
    q, k, v, dout = parts
    dist.barrier()
    start = time.perf_counter()
    torch.autograd.grad(function(q, k, v), [q, k, v], dout)
    dist.barrier()
    return time.perf_counter() - start


def _rank(rank: int, size: int, rounds: int, folder: str) -> None:
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    rows = []
    for num_tokens, heads, head_dim in SIZES:
        whole = [torch.randn(1, num_tokens, heads, head_dim) for _ in range(4)]
        plans = [ContextPlan(num_tokens, layout=layout, causal=True) for layout in LAYOUTS]
        variants: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {}
        for layout, plan in zip(LAYOUTS, plans, strict=True):
            parts = [plan.shard(x).requires_grad_() for x in whole]
            variants[layout] = (lambda q, k, v, p=plan: ring_attention(q, k, v, p), parts)

        def theirs(q: Tensor, k: Tensor, v: Tensor, bucket: int = num_tokens // size) -> Any:
            bucket = min(bucket, 512)
            return ring_flash_attn(q, k, v, causal=True, bucket_size=bucket, ring_reduce_col=True)

        variants["ring-attention-pytorch"] = (theirs, variants["contiguous"][1])
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(rounds + 1):
            for name, (function, parts) in variants.items():
                seconds = _turn(function, parts)
                if turn:  # the first warms up
                    times[name].append(seconds)
        medians = {name: statistics.median(t) * 1e3 for name, t in times.items()}
        rows.append({"tokens": num_tokens, "heads": heads, "head_dim": head_dim, "ms": medians})
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    run = new_run("cpu")
    with tempfile.TemporaryDirectory() as folder:
        start: Any = mp.spawn  # type: ignore[attr-defined]
        start(_rank, (args.ranks, args.rounds, folder), nprocs=args.ranks)
        run["rows"] = json.loads((Path(folder) / "rows.json").read_text())
    run["ranks"] = args.ranks
    path = RESULTS / "ring_gloo.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    for row in run["rows"]:
        print(row)


if __name__ == "__main__":
    main()
