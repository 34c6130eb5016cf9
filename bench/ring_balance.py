"""How much of the ranks' work is useful, counted: `python -m bench.ring_balance out.png`.

Useful: pairs of query and key that the mask lets see each other. Done: the tiles of 128 x 128 pairs
that the busiest rank computes, times the number of ranks. Nothing is measured.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlmkernels.distributed import Layout, Mask, make_mask
from vlmkernels.distributed import layout as layouts

TILE = 128
SIZES = (1, 2, 4, 8, 16, 32, 64)
TOKENS_PER_RANK = 8192


def documents(num_tokens: int, mean: int = 2048) -> Tensor:
    """Borders of packed documents of exponentially distributed lengths."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4 * num_tokens // mean + 8, generator=generator)
    ends = (-uniform.log() * mean).round().clamp(min=1).cumsum(0).long()
    return torch.cat([torch.tensor([0]), ends[ends < num_tokens], torch.tensor([num_tokens])])


def tiles(x: Tensor, value: int) -> Tensor:
    """x padded with `value` to rows of one tile each."""
    return torch.nn.functional.pad(x, (0, -len(x) % TILE), value=value).view(-1, TILE)


def efficiency(mask: Mask, layout: Layout) -> float:
    """Useful pairs over those of the tiles that the busiest rank computes, times ranks."""
    top = mask.num_tokens
    positions = [layout.positions(rank).long() for rank in range(layout.size)]
    low = torch.cat([tiles(p, top).amin(1) for p in positions])
    high = torch.cat([tiles(p, -1).amax(1) for p in positions])
    busiest = 0
    for held in positions:
        first = tiles(mask.first[0, held].long(), top).amin(1)
        last = tiles(mask.last[0, held].long(), -1).amax(1)
        done = (low <= last[:, None]) & (high >= first[:, None])
        busiest = max(busiest, int(done.sum()))
    return float(mask.work.sum()) / (busiest * TILE**2 * layout.size)


def zigzag_per_document(borders: Tensor, size: int) -> float:
    """Efficiency when every document is cut into 2 size parts, as ring-flash-attn's varlen ring.

    Its documents must be multiples of 2 size tokens long; here they are rounded up to that.
    """
    useful = done = 0.0
    for length in borders.diff().tolist():
        part = -(-length // (2 * size))
        half, whole = -(-part // TILE), -(-2 * part // TILE)
        useful += length * (length + 1) / 2
        diagonal = whole * (whole + 1) / 2
        done += (diagonal + (size - 1) * whole * half) * TILE**2
    return useful / (done * size)


def curves(packed: bool) -> Iterator[tuple[str, Callable[[int], float]]]:
    """(name, efficiency at a number of ranks) of every layout."""

    def borders(size: int) -> Tensor | None:
        return documents(TOKENS_PER_RANK * size) if packed else None

    def mask_of(size: int) -> Mask:
        return make_mask(TOKENS_PER_RANK * size, causal=True, cu_seqlens=borders(size))

    def of(name: str) -> Callable[[int], float]:
        def at(size: int) -> float:
            mask = mask_of(size)
            fixed = layouts.FIXED.get(name)
            layout = fixed(mask.num_tokens, size) if fixed else layouts.balanced(mask.work, size)
            return efficiency(mask, layout)

        return at

    yield from ((name, of(name)) for name in reversed(layouts.NAMES))
    if packed:

        def per_document(size: int) -> float:
            cut = borders(size)
            assert cut is not None
            return zigzag_per_document(cut, size)

        yield "zigzag, each document", per_document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained", sharey=True)
    heads = "one causal sequence", "packed causal documents, mean 2048 tokens"
    for axis, packed, head in zip(axes, (False, True), heads, strict=True):
        for (name, at), marker in zip(curves(packed), itertools.cycle("os^Dv"), strict=False):
            values = [at(size) for size in args.sizes]
            print(head, "|", name, "|", " ".join(f"{value:.2f}" for value in values), flush=True)
            axis.plot(args.sizes, values, marker=marker, markersize=4, label=name)
        axis.set(xscale="log", xlabel="ranks, 8192 tokens each", ylim=(0, 1.02))
        axis.set_xticks(args.sizes, [str(size) for size in args.sizes])
        axis.minorticks_off()
        axis.grid(linewidth=0.4, alpha=0.6)
        axis.set_title(head, fontsize=10, loc="left")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("useful share of the tiles computed (counted)")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
