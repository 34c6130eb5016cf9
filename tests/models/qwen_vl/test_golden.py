"""Qwen-VL against the numbers of its published code."""

from __future__ import annotations

import pytest
import torch

from tests.models.qwen_vl.conftest import load_model
from vlmkernels.models.qwen_vl import QwenVL

Golden = dict[str, torch.Tensor]


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_the_tower(model: QwenVL, golden: Golden) -> None:
    assert_near(model.image_features(golden["pixels"]), golden["visual"])


@pytest.mark.parametrize("case", ["short", "long", "longer"])
def test_logits(case: str, model: QwenVL, golden: Golden) -> None:
    """20 tokens of the 64 trained on; 100 and 150, where NTK (steps 1 and 2) and LogN act."""
    expected = golden[f"logits_{case}"]
    assert_near(model(golden[f"ids_{case}"]).logits[:, -expected.shape[1] :], expected)


def test_training_neither_stretches_nor_scales(golden: Golden) -> None:
    model = load_model().train()
    assert_near(model(golden["ids_long"]).logits[:, -24:], golden["logits_training"])


def test_images_stand_in_their_places(model: QwenVL, golden: Golden) -> None:
    logits = model(golden["ids_images"], pixel_values=golden["pixels"]).logits
    assert_near(logits, golden["logits_images"])


@pytest.mark.parametrize("prompt", [60, 70, 120])
def test_generation_keeps_the_prompts_base(prompt: int, model: QwenVL, golden: Golden) -> None:
    """60 grows beyond 64 tokens, 120 beyond 128: the base stays, LogN goes on."""
    ids, expected = golden[f"ids_cached_{prompt}"], golden[f"logits_cached_{prompt}"]
    logits, state = model.prefill(ids.shape[1] - prompt, input_ids=ids[:, :prompt])
    steps = [logits]
    for token in ids[:, prompt:].T:
        logits = model.decode(token, state)
        steps.append(logits)
    assert_near(torch.stack(steps, dim=1), expected)
