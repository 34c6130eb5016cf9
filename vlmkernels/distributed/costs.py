"""What `vlmkernels ring` prints."""

from rich.console import Console
from rich.table import Table

from .planner import Machine, causal_pairs, estimate


def show_costs(
    tokens: int, ranks: int, heads: int, heads_k: int, head_dim: int, document: int,
    bandwidth: float, flops: float,
) -> None:  # fmt: skip
    """A table of the derived cost of one causal attention layer; the arguments of the command."""
    numbers = {"tokens": tokens, "ranks": ranks, "heads": heads, "heads-k": heads_k}
    for name, value in {**numbers, "head-dim": head_dim}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if document < 0:
        raise ValueError(f"document: expected at least 0, got {document}")
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
