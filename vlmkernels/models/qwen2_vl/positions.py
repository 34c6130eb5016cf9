"""M-RoPE position ids by the published rule (arXiv 2409.12191, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def mrope_position_ids(
    input_ids: Tensor,
    *,
    image_token_id: int,
    video_token_id: int,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    merge_size: int = 2,
) -> tuple[Tensor, Tensor]:
    """Positions along time, height and width, (3, batch, seqlen), and rope_deltas (batch,).

    A text token at running index s gets (s, s, s) and moves s by one. An image or video of merged
    grid (t, h, w) that starts at s gets (s + i_t, s + i_h, s + i_w) and moves s by max(t, h, w):
    text goes on at the largest position so far plus one. Padding gets 0. The token generated n-th
    has position prompt_length + n + rope_delta. No step depends on values of `input_ids` on the
    host, so a GPU is never waited for.

    transformers (5.17 to 5.23) moves s by max(h, w) instead, which repeats positions when a video
    is longer than that; see https://github.com/huggingface/transformers/issues/45381.
    """
    advance = torch.ones_like(input_ids)
    offsets = input_ids.new_zeros(3, *input_ids.shape)
    for token_id, grid_thw in ((image_token_id, image_grid_thw), (video_token_id, video_grid_thw)):
        if grid_thw is None or len(grid_thw) == 0:
            continue
        block_offsets, block_advance = _vision_blocks(grid_thw, merge_size, input_ids)
        here = input_ids == token_id
        advance = advance.masked_scatter(here, block_advance)
        offsets = offsets.masked_scatter(here, block_offsets)
    if attention_mask is not None:
        advance = advance * (attention_mask != 0)
    end = advance.cumsum(dim=1)
    position_ids = (end - advance) + offsets
    lengths = torch.full_like(end[:, -1], input_ids.shape[1])
    if attention_mask is not None:
        position_ids = position_ids * (attention_mask != 0)
        lengths = (attention_mask != 0).sum(dim=1)
    return position_ids, end[:, -1] - lengths


def _vision_blocks(grid_thw: Tensor, merge_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (3, num_tokens) inside each block; advance (num_tokens,), 0 but at a block's end."""
    offsets, advances = [], []
    for t, h, w in grid_thw.tolist():
        shape = (t, h // merge_size, w // merge_size)
        axes = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
        offsets.append(torch.stack(axes).flatten(1))
        advance = torch.zeros(shape[0] * shape[1] * shape[2], dtype=torch.int64)
        advance[-1] = max(shape)
        advances.append(advance)
    return torch.cat(offsets, dim=1).to(like), torch.cat(advances).to(like)
