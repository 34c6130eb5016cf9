"""`vlmkernels ring`: what context parallelism would cost, derived from sizes; nothing runs."""

from typing import Annotated

import typer


def ring(
    tokens: Annotated[int, typer.Option(help="Tokens of the whole sequence.")] = 1 << 20,
    ranks: Annotated[int, typer.Option(help="GPUs that share it.")] = 16,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    heads_k: Annotated[int, typer.Option(help="Key heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 128,
    document: Annotated[int, typer.Option(help="Length of packed documents; 0: one.")] = 0,
    bandwidth: Annotated[float, typer.Option(help="GB/s per direction and GPU.")] = 360.0,
    flops: Annotated[float, typer.Option(help="TFLOP/s that attention achieves.")] = 600.0,
) -> None:
    """Derive compute, transfers and memory of one causal attention layer, forward and backward."""
    from rich.console import Console
    from rich.table import Table

    from .planner import Machine, causal_pairs, estimate

    numbers = {"tokens": tokens, "ranks": ranks, "heads": heads, "heads-k": heads_k}
    for name, value in {**numbers, "head-dim": head_dim}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if heads % heads_k:
        raise ValueError(f"heads-k: expected a divisor of {heads}, got {heads_k}")
    if min(bandwidth, flops) <= 0:
        raise ValueError(f"bandwidth and flops: expected > 0, got {bandwidth} and {flops}")
    length = min(document or tokens, tokens)
    pairs = causal_pairs(length) * (tokens / length)
    machine = Machine(flops * 1e12, bandwidth * 1e9)
    table = Table(title=f"one layer, {tokens:,} tokens on {ranks} ranks; derived, not measured")
    for column in ("way", "compute", "transfer", "exposed", "hop", "memory"):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for cost in estimate(pairs, tokens, ranks, heads, heads_k, head_dim, machine=machine):
        hop = f"{cost.hop_compute * 1e3:.3g} / {cost.hop_transfer * 1e3:.3g} ms"
        times = (f"{t * 1e3:.3g} ms" for t in (cost.compute, cost.transfer, cost.exposed))
        table.add_row(cost.way, *times, hop, f"{cost.memory / 2**30:.3g} GiB")
    console = Console()
    console.print(table)
    console.print(
        "compute, transfer: forward and backward on each rank, if work is balanced\n"
        "exposed: transfers that no compute hides\n"
        "hop: compute / transfer of one hop forward; memory: of this layer, on each rank"
    )
