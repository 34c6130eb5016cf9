"""What every token of a sequence sees, as one interval of positions.

Causal and bidirectional text, sliding windows, packed documents and images whose tokens see each
other are all intervals: query i sees the keys at positions first[i] to last[i]. A rank that holds
any part of the keys then needs their positions only.
"""

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Query i sees the keys at positions first[..., i] <= position <= last[..., i].

    first, last: int32 (1, num_tokens), or (batch, num_tokens) where rows differ.
    """

    first: Tensor
    last: Tensor

    @property
    def num_tokens(self) -> int:
        return self.first.shape[-1]

    @property
    def work(self) -> Tensor:
        """(num_tokens,) int64: how many keys each query sees, over all rows."""
        return (self.last.long() - self.first.long() + 1).clamp(min=0).sum(0)


def make_mask(
    num_tokens: int,
    *,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
    segment_ids: Tensor | None = None,
    image_blocks: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    device: torch.device | str | None = None,
) -> Mask:
    """query i sees key j  <=>  segment_i = segment_j  and
    (i - left <= j <= i + right  or  block_i = block_j >= 0).

    The masks of `vlmkernels.ops.attention`; causal: right = 0.

    Args:
        cu_seqlens: int32 (num_documents + 1,), borders of packed documents; or
        segment_ids: (num_tokens,) or (batch, num_tokens) integers, equal within a document; a
            document's tokens stand together.
        image_blocks: as segment_ids; equal within an image (or a frame), -1 for text. An image's
            tokens stand together, within one document.
        window: (left, right) tokens, -1 for no bound, as flash-attention's window_size.

    Raises:
        ValueError: shapes or borders are not as above. TypeError: so for types.
    """
    _expect_types(
        num_tokens, causal, cu_seqlens=cu_seqlens, segment_ids=segment_ids,
        image_blocks=image_blocks,
    )  # fmt: skip
    if cu_seqlens is not None:
        if segment_ids is not None:
            raise ValueError("cu_seqlens: expected None beside segment_ids, got both")
        segment_ids = _segments(num_tokens, cu_seqlens)
    segment_ids, image_blocks = (
        None if ids is None else ids.to(device) for ids in (segment_ids, image_blocks)
    )
    index = torch.arange(num_tokens, dtype=torch.int32, device=device)[None]
    first, last = torch.zeros_like(index), torch.full_like(index, num_tokens - 1)
    segments = _rows("segment_ids", segment_ids, num_tokens)
    blocks = _rows("image_blocks", image_blocks, num_tokens)
    if segments is not None:
        first, last = _runs(segments, index)
    low, high = first, last
    left, right = window[0], 0 if causal else window[1]
    if left >= 0:
        first = first.maximum(index - left)
    if right >= 0:
        last = last.minimum(index + right)
    if blocks is not None:
        begin, end = _runs(blocks, index)
        first = torch.where(blocks >= 0, first.minimum(begin.maximum(low)), first)
        last = torch.where(blocks >= 0, last.maximum(end.minimum(high)), last)
    first, last = torch.broadcast_tensors(first, last)
    return Mask(first.contiguous(), last.contiguous())


def _expect_types(num_tokens: object, causal: object, **ids: object) -> None:
    if not isinstance(num_tokens, Integral) or isinstance(num_tokens, bool):
        raise TypeError(f"num_tokens: expected an int, got {num_tokens!r:.80}")
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected at least 0, got {num_tokens}")
    expect_bool("causal", causal)
    for name, x in ids.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(x).__name__}")


def expect_bool(name: str, value: object) -> None:
    """TypeError naming the argument; anything else would be true or false as well."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r:.80}")


def _segments(num_tokens: int, cu_seqlens: Tensor) -> Tensor:
    borders = cu_seqlens.long()
    whole = borders.ndim == 1 and len(borders) > 1
    if not whole or borders[0] != 0 or borders[-1] != num_tokens or (borders.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens: expected (num_documents + 1,) rising from 0 to {num_tokens}, "
            f"got {cu_seqlens.tolist()[:8]}"
        )
    index = torch.arange(num_tokens, device=borders.device)
    return torch.searchsorted(borders[1:].contiguous(), index, right=True)


def _rows(name: str, ids: Tensor | None, num_tokens: int) -> Tensor | None:
    if ids is None:
        return None
    rows = ids[None] if ids.ndim == 1 else ids
    if rows.ndim != 2 or rows.shape[1] != num_tokens or rows.is_floating_point():
        raise ValueError(
            f"{name}: expected integers ({num_tokens},) or (batch, {num_tokens}), "
            f"got {ids.dtype} {tuple(ids.shape)}"
        )
    return rows


def _runs(ids: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """First and last place of the run of equal ids around each place."""
    if ids.shape[1] == 0:
        return index.expand(ids.shape), index.expand(ids.shape)
    changes = ids.diff(dim=1) != 0
    edge = changes.new_ones(len(ids), 1)
    first = torch.where(torch.cat([edge, changes], 1), index, 0).cummax(1).values
    ends = torch.where(torch.cat([changes, edge], 1), index, index.shape[1])
    last = ends.flip(1).cummin(1).values.flip(1)
    return first, last
