"""Files of a checkpoint that say nonsense: the field, what was expected, and what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlmkernels.models import load, load_processor
from vlmkernels.models.qwen2_vl import Qwen2VLConfig
from vlmkernels.models.qwen2_vl.processor import PixelSettings

NAN = float("nan")
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"vision_config": [1]}, r"vision_config: expected an object, got \[1\]"),
    ({"text_config": "big"}, "text_config: expected an object, got 'big'"),
    ({"rope_scaling": "mrope"}, "rope_scaling: expected an object, got 'mrope'"),
    ({"rope_parameters": 1.0}, "rope_parameters: expected an object, got 1.0"),
    ({"hidden_size": "1536"}, "hidden_size: expected a positive integer, got '1536'"),
    ({"hidden_size": 1536.0}, "hidden_size: expected a positive integer, got 1536.0"),
    ({"vocab_size": -1}, "vocab_size: expected a positive integer, got -1"),
    ({"vocab_size": 10**30}, "vocab_size: expected a positive integer, got 1000"),
    ({"num_hidden_layers": True}, "num_hidden_layers: expected a positive integer, got True"),
    ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer, got 0"),
    ({"hidden_act": ["silu"]}, "hidden_act: expected a string"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps: expected a positive number, got 'tiny'"),
    ({"rope_theta": NAN}, "rope_theta: expected a positive number, got nan"),
    ({"initializer_range": -1}, "initializer_range: expected a number of at least 0, got -1"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings: expected true or false, got 'false'"),
    ({"use_sliding_window": "no"}, "use_sliding_window: expected true or false, got 'no'"),
    ({"image_token_id": None}, "image_token_id: expected an integer of at least 0, got None"),
    ({"eos_token_id": [2, "a"]}, "eos_token_id: expected integers of at least 0"),
    ({"pad_token_id": -2}, "pad_token_id: expected an integer of at least 0 or null, got -2"),
    ({"rope_scaling": {"mrope_section": 64}}, "mrope_section: expected three integers"),
    ({"rope_scaling": {"mrope_section": [32, 32]}}, "mrope_section: expected three integers"),
    ({"vision_config": {"depth": "2"}}, r"vision_config\.depth: expected a positive integer"),
    ({"vision_config": {"in_chans": []}}, r"vision_config\.in_channels: expected a positive int"),
    ({"vision_config": {"spatial_merge_size": 0}}, r"vision_config\.spatial_merge_size: expected"),
    ({"vision_config": {"mlp_ratio": -4}}, r"vision_config\.mlp_ratio: expected a positive number"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS, ids=[str(c) for c, _ in CONFIGS])
def test_a_malformed_config_is_named(change: dict[str, Any], message: str) -> None:
    published = Qwen2VLConfig.preset("2B").to_dict()
    with pytest.raises(ValueError, match=message):
        Qwen2VLConfig.from_dict(published | change)


PIXELS: list[tuple[dict[str, Any], str]] = [
    ({"patch_size": 0}, "patch_size: expected a positive integer, got 0"),
    ({"merge_size": "2"}, "merge_size: expected a positive integer, got '2'"),
    ({"temporal_patch_size": 2.0}, "temporal_patch_size: expected a positive integer, got 2.0"),
    ({"max_pixels": -1}, "max_pixels: expected a positive integer, got -1"),
    ({"size": {"shortest_edge": "many"}}, "min_pixels: expected an integer of at least 0"),
    ({"size": [56, 56]}, r"size: expected an object, got \[56, 56\]"),
    ({"do_resize": "false"}, "do_resize: expected true or false, got 'false'"),
    ({"resample": 17}, r"resample: expected one of \[0, .*\], got 17"),
    ({"rescale_factor": NAN}, "rescale_factor: expected a positive number, got nan"),
    ({"image_mean": 0.5}, "image_mean: expected three numbers, got 0.5"),
    ({"image_mean": [0.5, 0.5]}, "image_mean: expected three numbers"),
    ({"image_mean": [0.5, 0.5, NAN]}, "image_mean: expected three numbers"),
    ({"image_std": [0, 0, 0]}, r"image_std: expected three positive numbers, got \[0, 0, 0\]"),
    ({"image_std": [0.5, 0.5, None]}, "image_std: expected three positive numbers"),
]


@pytest.mark.parametrize(("raw", "message"), PIXELS, ids=[str(c) for c, _ in PIXELS])
def test_malformed_pixel_settings_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelSettings.from_dict(raw)


INDEX = "model.safetensors.index.json"
FILES: list[tuple[str, Any, str]] = [
    (INDEX, {"weight_map": ["a"]}, "weight_map: expected an object of file names"),
    (INDEX, {"weight_map": {"a": 1}}, "weight_map: expected an object of file names"),
    (INDEX, {"weight_map": {"a": "../b"}}, "weight_map: expected an object of file names"),
    (INDEX, {}, r"index\.json: weight_map: expected an object of file names, got None"),
    ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id: expected integers"),
    ("processor_config.json", {"image_processor": [1]}, "image_processor: expected an object"),
    ("tokenizer_config.json", {"eos_token": {"text": "x"}}, "expected a special token as text"),
    ("chat_template.json", {"chat_template": 5}, "chat_template: expected a string, got 5"),
    ("preprocessor_config.json", {"patch_size": "x"}, "patch_size: expected a positive integer"),
]


@pytest.mark.parametrize(("file", "content", "message"), FILES)
def test_a_malformed_file_is_named(
    file: str, content: Any, message: str, checkpoint_dir: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(checkpoint_dir, tmp_path / "copy"))
    (path / file).write_text(json.dumps(content))

    def answer() -> None:
        inputs = load_processor(path)("What?")
        load(path).generate(**inputs, max_new_tokens=1)

    with pytest.raises(ValueError, match=message):
        answer()
