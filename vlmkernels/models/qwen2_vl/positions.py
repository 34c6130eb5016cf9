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
    second_per_grid_ts: Tensor | None = None,
    tokens_per_second: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions along time, height and width, (3, batch, seqlen), and rope_deltas (batch,).

    A text token at running index s gets (s, s, s) and moves s by one. An image or video of merged
    grid (t, h, w) that starts at s gets (s + i_t, s + i_h, s + i_w) and moves s by max(t, h, w):
    text goes on at the largest position so far plus one. Padding gets 0. The token generated n-th
    has position prompt_length + n + rope_delta.

    With tokens_per_second (Qwen2.5-VL, arXiv 2502.13923) i_t of a video counts time instead of
    steps: floor(step * seconds * tokens_per_second), the seconds of a step being those of its video
    in second_per_grid_ts, 1 by default. No step depends on values of `input_ids` on the
    host, so a GPU is never waited for.

    transformers (5.17 to 5.23) moves s by max(h, w) instead, which repeats positions when a video
    is longer than that; see https://github.com/huggingface/transformers/issues/45381.
    """
    advance = torch.ones_like(input_ids)
    offsets = input_ids.new_zeros(3, *input_ids.shape)
    seconds = None if second_per_grid_ts is None else second_per_grid_ts.tolist()
    for token_id, grid_thw, scale in (
        (image_token_id, image_grid_thw, None),
        (video_token_id, video_grid_thw, tokens_per_second),
    ):
        if grid_thw is None or len(grid_thw) == 0:
            continue
        grids = [(t, h // merge_size, w // merge_size) for t, h, w in grid_thw.tolist()]
        times = [_times(t, i, scale, seconds) for i, (t, _, _) in enumerate(grids)]
        block_offsets, block_advance = _vision_blocks(grids, times, input_ids)
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


def _times(steps: int, video: int, scale: int | None, seconds: list[float] | None) -> Tensor:
    """(steps,) positions in time; float32 and rounded down, as published."""
    if scale is None:
        return torch.arange(steps)
    return (torch.arange(steps) * (1.0 if seconds is None else seconds[video]) * scale).long()


def _vision_blocks(
    grids: list[tuple[int, int, int]], times: list[Tensor], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Offsets (3, num_tokens) inside each block; advance (num_tokens,), 0 but at a block's end."""
    offsets, advances = [], []
    for (t, h, w), time in zip(grids, times, strict=True):
        axes = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
        offsets.append(torch.stack(axes).flatten(1))
        advance = torch.zeros(t * h * w, dtype=torch.int64)
        advance[-1] = max(int(time[-1]) + 1, h, w)
        advances.append(advance)
    return torch.cat(offsets, dim=1).to(like), torch.cat(advances).to(like)
