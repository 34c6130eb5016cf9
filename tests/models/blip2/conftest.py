"""Small random checkpoints written by transformers itself, with tokenizers made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.models.common import randomize

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QFORMER = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
}


def pixels(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(5))


def write_retrieval(path: Path, **options: Any) -> Any:
    qformer = QFORMER | {"use_qformer_text_input": True}
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=qformer,
        num_query_tokens=4,
        image_text_hidden_size=24,
        **options,
    )
    model = transformers.Blip2ForImageTextRetrieval(config)
    randomize(model)
    model.save_pretrained(path)
    return model.eval()


@pytest.fixture(scope="package")
def retrieval_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retrieval")
    write_retrieval(path)
    return path


@pytest.fixture(scope="package")
def hf_retrieval(retrieval_dir: Path) -> Any:
    return transformers.Blip2ForImageTextRetrieval.from_pretrained(retrieval_dir).eval()
