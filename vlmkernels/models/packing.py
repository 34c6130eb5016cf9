"""A padded (batch, seqlen) grid as one run of tokens without padding, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each sequence of a batch lies in the packed run of tokens."""

    batch: int
    seqlen: int
    cu_seqlens: Tensor  # (num_sequences + 1,) int32
    max_seqlen: int
    indices: Tensor | None  # (num_tokens,) int64 places in the flat grid; None: no padding

    def pack(self, x: Tensor) -> Tensor:
        """(batch, seqlen, ...) -> (num_tokens, ...)"""
        flat: Tensor = x.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def unpack(self, x: Tensor) -> Tensor:
        """(num_tokens, ...) -> (batch, seqlen, ...), zeros on padding"""
        if self.indices is not None:
            grid = x.new_zeros(self.batch * self.seqlen, *x.shape[1:])
            x = grid.index_copy(0, self.indices, x)
        grid_of_rows: Tensor = x.unflatten(0, (self.batch, self.seqlen))
        return grid_of_rows


def expect_grid(name: str, tensor: Tensor | None, x: Tensor) -> None:
    """ValueError unless `tensor`, if there is one, has the (batch, seqlen) of x."""
    if tensor is not None and not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor is not None and tensor.shape != x.shape[:2]:
        raise ValueError(f"{name}: expected shape {tuple(x.shape[:2])}, got {tuple(tensor.shape)}")


def expect_no_empty_row(packing: Packing) -> None:
    """ValueError unless every row has a token to go on from."""
    if not bool(packing.cu_seqlens.diff().all()):
        raise ValueError("attention_mask: expected a token in every row, got a row of padding")


def make_packing(
    batch: int,
    seqlen: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    text_positions: Tensor | None = None,
) -> Packing:
    """The packing of a batch; without mask and text positions nothing waits for the device.

    attention_mask: (batch, seqlen), 0 on padding, on either side or both. text_positions:
    (batch, seqlen), the running index of every token; a row holds several documents where it
    does not go up by one, and attention then stays inside a document.
    """
    if attention_mask is not None and bool((attention_mask != 0).all()):
        attention_mask = None  # no padding: nothing to gather
    if attention_mask is None and text_positions is None:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
        return Packing(batch, seqlen, cu_seqlens, seqlen, None)
    indices = None
    if attention_mask is not None:
        indices = attention_mask.to(device).flatten().nonzero().flatten()
        lengths = (attention_mask.to(device) != 0).sum(dim=1)
    else:
        lengths = torch.full((batch,), seqlen, device=device)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if text_positions is not None:
        flat = text_positions.to(device).flatten()
        flat = flat if indices is None else flat[indices]
        cu_seqlens = _document_starts(flat, cu_seqlens)
    max_seqlen = int(cu_seqlens.diff().max())
    return Packing(batch, seqlen, cu_seqlens.to(torch.int32), max_seqlen, indices)


def _document_starts(text_positions: Tensor, cu_seqlens: Tensor) -> Tensor:
    """cu_seqlens split further wherever a position is not its predecessor's plus one."""
    starts = torch.ones(len(text_positions) + 1, dtype=torch.bool, device=text_positions.device)
    starts[1:-1] = text_positions.diff() != 1
    starts[cu_seqlens] = True
    return starts.nonzero().flatten()
