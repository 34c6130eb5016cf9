"""The tiny checkpoint of tests/data/qwen_vl and what the published code computed with it.

Its random weights are bf16 numbers, computed with in fp32. golden.safetensors holds inputs (ids_*,
pixels) and outputs of the published remote code (logits_*, those of long prompts the last 24;
logits_cached_N follow the cached code from a prompt of N tokens on, one token at a time).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmkernels.models.qwen_vl import QwenVL

DATA = Path(__file__).resolve().parents[2] / "data" / "qwen_vl"
IMG, NUM_SLOTS = 290, 16  # <img> of this checkpoint; </img> and <imgpad> follow


@pytest.fixture(scope="package")
def golden() -> dict[str, torch.Tensor]:
    return load_file(DATA / "golden.safetensors")


def load_model() -> QwenVL:
    return QwenVL.from_pretrained(DATA, dtype=torch.float32)


@pytest.fixture(scope="package")
def model() -> QwenVL:
    """Shared: leave it in eval mode."""
    return load_model()
