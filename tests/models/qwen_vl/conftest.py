"""The tiny checkpoint of tests/data/qwen_vl and what the published code computed with it.

Its random weights are bf16 numbers, computed with in fp32. golden.safetensors holds inputs (ids_*,
pixels) and outputs of the published remote code (logits_*, those of long prompts the last 24;
logits_cached_N follow the cached code from a prompt of N tokens on, one token at a time).
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models.common import randomize
from vlmkernels.models import load_processor
from vlmkernels.models.qwen_vl import (
    QwenTokenizer,
    QwenVisionConfig,
    QwenVL,
    QwenVLConfig,
    QwenVLProcessor,
)

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


WORDS = "the picture shows a dog and two cats; 图中有一只狗"


def make_ranks() -> dict[bytes, int]:
    """Every byte in some order, then every piece of the words, short ones first."""
    single = [bytes([i]) for i in range(256)]
    random.Random(0).shuffle(single)
    texts = [word.encode() for word in WORDS.split()]
    pieces = {
        t[i:j] for t in texts for i in range(len(t)) for j in range(i + 2, min(len(t), i + 5) + 1)
    }
    return {t: i for i, t in enumerate([*single, *sorted(pieces, key=lambda t: (len(t), t))])}


def write(path: Path) -> None:
    """A model with the vocabulary above and room for its special tokens, as Qwen-VL-Chat's."""
    tokenizer = QwenTokenizer(make_ranks())
    visual = QwenVisionConfig(
        *(28, 14, 32, 1, 2, 2.0, 128),
        n_queries=NUM_SLOTS,
        image_start_id=tokenizer.special["<img>"],
    )
    config = QwenVLConfig(len(tokenizer) + 4, 128, 96, 1, 2, 64, seq_length=64, visual=visual)
    torch.manual_seed(0)
    model = QwenVL(config)
    randomize(model)
    model.generation_config = {
        "chat_format": "chatml",
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
        "max_window_size": 200,
    }
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="package")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen_vl_chat")
    write(path)
    return path


@pytest.fixture
def processor(chat_dir: Path) -> QwenVLProcessor:
    return load_processor(chat_dir)
