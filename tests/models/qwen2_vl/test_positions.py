"""M-RoPE position ids: transformers where it is right, the published rule written out where not."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.models.qwen2_vl import cases
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor, mrope_position_ids


@pytest.mark.parametrize("case", ["one_image", "two_images", "padded_left", "padded_right"])
def test_positions_match_transformers_for_images(
    case: str,
    model: Qwen2VL,
    hf_model: transformers.Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
) -> None:
    inputs = cases.make(case, processor)
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    expected, expected_deltas = hf_model.model.get_rope_index(**{k: inputs[k] for k in names})
    position_ids, deltas = cases.positions(inputs, model)
    real = inputs["attention_mask"] == 1
    assert torch.equal(position_ids[:, real], expected[:, real])
    assert torch.equal(deltas, expected_deltas[:, 0])


def test_text_after_a_video_goes_on_behind_the_largest_position() -> None:
    text, pad = 1, 9
    ids = torch.tensor([[text, *[pad] * 6, text, text]])
    position_ids, deltas = mrope_position_ids(
        ids, image_token_id=8, video_token_id=pad, video_grid_thw=torch.tensor([[3, 2, 4]])
    )
    # Merged grid: 3 time steps, 1 row, 2 columns. It starts at 1, its largest id is 1 + 2.
    assert position_ids.tolist() == [
        [[0, 1, 1, 2, 2, 3, 3, 4, 5]],
        [[0, 1, 1, 1, 1, 1, 1, 4, 5]],
        [[0, 1, 2, 1, 2, 1, 2, 4, 5]],
    ]
    assert deltas.tolist() == [5 + 1 - 9]


def rule_by_the_book(ids: list[int], blocks: list[tuple[int, int, int]]) -> list[tuple[int, ...]]:
    """The published rule token by token; `ids` has one 9 per block, `blocks` merged grids."""
    out: list[tuple[int, ...]] = []
    grids = iter(blocks)
    for i in ids:
        start = max((max(p) for p in out), default=-1) + 1
        if i != 9:
            out.append((start, start, start))
            continue
        t, h, w = next(grids)
        out += [
            (start + a, start + b, start + c) for a in range(t) for b in range(h) for c in range(w)
        ]
    return out


def test_images_and_videos_in_any_order_follow_the_rule() -> None:
    blocks = [(1, 2, 3), (4, 1, 2), (1, 1, 1), (2, 3, 1)]
    kinds = [7, 8, 7, 8]  # two images and two videos, two of them side by side
    layout = [1, 9, 1, 1, 9, 9, 9, 1]
    expected = rule_by_the_book(layout, blocks)
    order = iter(zip(kinds, blocks, strict=True))
    ids: list[int] = []
    for i in layout:
        kind, (t, h, w) = next(order) if i == 9 else (1, (1, 1, 1))
        ids += [kind] * (t * h * w)
    grids = [
        torch.tensor(
            [[t, 2 * h, 2 * w] for k, (t, h, w) in zip(kinds, blocks, strict=True) if k == x]
        )
        for x in (7, 8)
    ]
    position_ids, deltas = mrope_position_ids(
        torch.tensor([ids]),
        image_token_id=7,
        video_token_id=8,
        image_grid_thw=grids[0],
        video_grid_thw=grids[1],
    )
    assert position_ids[:, 0].T.tolist() == [list(p) for p in expected]
    assert deltas.item() == max(max(p) for p in expected) + 1 - len(ids)


def test_text_only_positions_are_the_running_index_and_padding_is_zero() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    position_ids, deltas = mrope_position_ids(
        torch.ones(2, 5, dtype=torch.int64), image_token_id=7, video_token_id=8, attention_mask=mask
    )
    assert position_ids.tolist() == [[[0, 0, 0, 1, 2], [0, 1, 2, 0, 0]]] * 3
    assert deltas.tolist() == [0, 0]
