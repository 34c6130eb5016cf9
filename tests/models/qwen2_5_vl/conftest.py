"""A small random checkpoint written by transformers itself, with Qwen2-VL's test tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.models.common import randomize
from tests.models.qwen2_vl.conftest import hf_config, write_tokenizer
from vlmkernels.models import load, load_processor
from vlmkernels.models.qwen2_5_vl import Qwen25VL, Qwen25VLProcessor


def hf_config_25(path: Path, **options: Any) -> Any:
    older = hf_config(write_tokenizer(path)).to_dict()
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    ids = {key: value for key, value in older.items() if key.endswith("_token_id")}
    text = {k: v for k, v in older["text_config"].items() if k not in ("model_type", "layer_types")}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids, **options)


def write(path: Path) -> None:
    model = transformers.Qwen2_5_VLForConditionalGeneration(hf_config_25(path))
    randomize(model)
    model.save_pretrained(path)
    processor = transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 64)
    processor.save_pretrained(path)


@pytest.fixture(scope="package")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen2_5_vl")
    write(path)
    return path


@pytest.fixture(scope="package")
def hf_model(checkpoint_dir: Path) -> Any:
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint_dir).eval()


@pytest.fixture(scope="package")
def model(checkpoint_dir: Path) -> Qwen25VL:
    return load(checkpoint_dir)


@pytest.fixture(scope="package")
def processor(checkpoint_dir: Path) -> Qwen25VLProcessor:
    processor: Qwen25VLProcessor = load_processor(checkpoint_dir)
    processor.video.min_pixels = 56 * 56  # frames stay as small as they are given
    return processor
