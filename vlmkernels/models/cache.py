"""Keys and values of the tokens seen so far, preallocated."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmkernels.models.packing import Packing


class LayerCache:
    """One layer's share: keys, values (batch, max_seqlen, num_heads_k, head_dim)."""

    def __init__(self, cache: KVCache, keys: Tensor, values: Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values

    @property
    def decoding(self) -> bool:
        return self.cache.decoding

    @property
    def seqlens(self) -> Tensor:
        return self.cache.seqlens

    def write(self, k: Tensor, v: Tensor) -> None:
        """Put the new tokens' k, v (num_tokens, num_heads_k, head_dim) where `KVCache` reserved."""
        self.keys[self.cache.rows, self.cache.columns] = k
        self.values[self.cache.rows, self.cache.columns] = v


class KVCache:
    """Row i holds the tokens of batch row i from place 0, whatever the padding of the prompt was.

    A step reserves places for its new tokens (`start` for the prompt, `advance` for one token of
    every row); then each layer writes there. `seqlens` (batch,) int32 counts them already;
    `length`, known without waiting for the device, is the longest row's.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        max_seqlen: int,
        num_heads_k: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (2, num_layers, batch, max_seqlen, num_heads_k, head_dim)
        # Not zeroed: attention never reads beyond seqlens.
        keys, values = torch.empty(shape, dtype=dtype, device=device)
        self.layers = [LayerCache(self, k, v) for k, v in zip(keys, values, strict=True)]
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.prompt_seqlens = self.seqlens  # what they were after `start`
        self.rows = torch.arange(batch, device=device)
        self.columns = self.seqlens.long()
        self.length = 0
        self.decoding = False

    def start(self, packing: Packing) -> None:
        """Reserve the places of a prompt, packed as `packing`, in an empty cache."""
        self.seqlens, self.length = packing.cu_seqlens.diff(), packing.max_seqlen
        self.prompt_seqlens = self.seqlens
        self.rows = torch.repeat_interleave(self.seqlens)
        self.columns = torch.arange(len(self.rows), device=self.rows.device)
        self.columns -= packing.cu_seqlens[self.rows]
        self.decoding = False

    def advance(self) -> None:
        """Reserve one more place in every row."""
        self.rows = torch.arange(len(self.seqlens), device=self.seqlens.device)
        self.columns = self.seqlens.long()
        self.seqlens, self.length = self.seqlens + 1, self.length + 1
        self.decoding = True

    def select(self, rows: Tensor) -> None:
        """Row i becomes a copy of row rows[i]; there may be more or fewer rows than before."""
        if len(rows) == len(self.seqlens):
            moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().flatten()
            for layer in self.layers:
                for x in (layer.keys, layer.values):
                    x[moved, : self.length] = x[rows[moved], : self.length]
        else:
            for layer in self.layers:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.seqlens, self.prompt_seqlens = self.seqlens[rows], self.prompt_seqlens[rows]
