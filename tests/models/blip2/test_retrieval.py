"""BLIP-2's image-text retrieval against transformers, on checkpoints that transformers wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.blip2.conftest import pixels
from tests.models.common import (
    assert_grads_match,
)
from vlmkernels.models import load


def texts(count: int = 3, *, padded: bool = True) -> dict[str, torch.Tensor]:
    """Of 6, 4 and 2 words, padded on the right."""
    ids = torch.randint(1, 40, (count, 6), generator=torch.Generator().manual_seed(3))
    if not padded:
        return {"input_ids": ids}
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:count, None]
    return {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}


@pytest.mark.parametrize("match", [False, True], ids=["contrast", "match"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_logits_and_gradients_match_transformers(
    match: bool, padded: bool, retrieval_dir: Path, hf_retrieval: Any
) -> None:
    model, inputs = load(retrieval_dir), texts(padded=padded)
    inputs["attention_mask"] = inputs.get("attention_mask", torch.ones(3, 6, dtype=torch.int64))
    inputs |= {"pixel_values": pixels(3)}
    hf_retrieval.zero_grad()
    ours = model(**inputs, use_image_text_matching_head=match)
    theirs = hf_retrieval(**inputs, use_image_text_matching_head=match)
    assert theirs.logits_per_image.std() > 0.03
    torch.testing.assert_close(ours.logits_per_image, theirs.logits_per_image, rtol=0, atol=1e-5)
    weight = torch.randn_like(ours.logits_per_image)
    for logits in (ours.logits_per_image, theirs.logits_per_image):
        (logits * weight).sum().backward()
    assert_grads_match(model, hf_retrieval)
    if not match:
        torch.testing.assert_close(ours.image_embeds, theirs.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.text_embeds, theirs.text_embeds, rtol=0, atol=1e-5)
