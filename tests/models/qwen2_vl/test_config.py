"""Configs: published files in both layouts, the published sizes, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLConfig

# Qwen/Qwen2-VL-2B-Instruct, config.json, with the sparse vision_config of the published file.
PUBLISHED_2B: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "hidden_size": 1536,
        "in_chans": 3,
        "model_type": "qwen2_vl",
        "spatial_patch_size": 14,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def test_the_published_file_is_the_preset() -> None:
    assert Qwen2VLConfig.from_dict(PUBLISHED_2B) == Qwen2VLConfig.preset("2B")


def test_a_saved_config_keeps_the_published_file_and_reads_back() -> None:
    config = Qwen2VLConfig.from_dict(PUBLISHED_2B)
    saved = config.to_dict()
    for key, value in PUBLISHED_2B.items():
        if key != "vision_config":
            assert saved[key] == value, key
    assert PUBLISHED_2B["vision_config"].items() <= saved["vision_config"].items()
    assert Qwen2VLConfig.from_dict(saved) == config
    assert Qwen2VLConfig.from_dict(Qwen2VLConfig.preset("7B").to_dict()) == Qwen2VLConfig.preset(
        "7B"
    )


def test_transformers_understands_a_preset_the_same_way() -> None:
    ours = Qwen2VLConfig.preset("7B")
    theirs = transformers.Qwen2VLConfig(**ours.to_dict())
    text, vision = theirs.text_config, theirs.vision_config
    for name in ("vocab_size", "hidden_size", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(text, name) == getattr(ours, name)
    assert tuple(text.rope_parameters["mrope_section"]) == ours.mrope_section
    assert text.rope_parameters["rope_theta"] == ours.rope_theta
    assert (vision.embed_dim, vision.depth, vision.hidden_size) == (1280, 32, 3584)
    # The nested layout that transformers writes reads back to the same config.
    assert Qwen2VLConfig.from_dict(theirs.to_dict()) == ours


@pytest.mark.parametrize(("name", "millions"), [("2B", 2209), ("7B", 8291), ("72B", 73406)])
def test_published_sizes_have_the_published_parameter_counts(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = Qwen2VL(Qwen2VLConfig.preset(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling type: expected 'mrope'"),
        ({"use_sliding_window": True}, "use_sliding_window: expected false"),
        ({"num_attention_heads": 7}, "hidden_size: expected a positive multiple of"),
        ({"num_key_value_heads": 5}, "expected a positive multiple of num_key_value_heads = 5"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [8, 8, 8]}}, "mrope_section"),
        ({"vision_config": {"hidden_size": 8}}, "vision_config.hidden_size: expected hidden_size"),
        ({"vision_config": {"num_heads": 3}}, "vision embed_dim: expected a positive multiple"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Qwen2VLConfig.from_dict(PUBLISHED_2B | change)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"preset: expected one of .*'2B'.*, got '3B'"):
        Qwen2VLConfig.preset("3B")
    with torch.device("meta"), pytest.raises(ValueError, match="hidden_act: expected one of"):
        Qwen2VL(Qwen2VLConfig.from_dict(PUBLISHED_2B | {"hidden_act": "relu6"}))
