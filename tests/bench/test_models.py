"""The end-to-end bench: both models compute the same with the same tensors."""

from __future__ import annotations

import pytest
import torch

from bench.measure import measure
from bench.models import qwen2_vl
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLConfig, Qwen2VLVisionConfig


@pytest.fixture
def config() -> Qwen2VLConfig:
    vision = Qwen2VLVisionConfig(depth=2, embed_dim=64, num_heads=4, hidden_size=64, mlp_ratio=2)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mrope_section": (2, 3, 3)}
    ids = {"image_token_id": 1500, "video_token_id": 1501, "vision_start_token_id": 1502}
    ids |= {"bos_token_id": 1, "eos_token_id": 2}
    return Qwen2VLConfig(vocab_size=1600, **sizes, **heads, **ids, vision=vision)


def test_prefill_decode_and_training_agree_with_transformers(config: Qwen2VLConfig) -> None:
    ceiling = {"copy_gbps": 1.0, "gemm_tflops": 1.0}
    rows = [
        measure(case, ceiling, rounds=1)
        for case in qwen2_vl.cases_of(config, (2, 12, 4), "tiny", "cpu", torch.float32)
    ]
    assert [row["direction"] for row in rows] == ["prefill", "decode", "train step"]
    for row in rows:
        assert row["error"] < 1e-5 and row["rivals"]["transformers SDPA"]["error"] < 1e-5
        assert row["tokens_per_s"] > 0 and row["peak_mb"] > 0
        assert "random weights" in row["note"]


def test_transformers_model_shares_our_tensors(config: Qwen2VLConfig) -> None:
    model = Qwen2VL(config)
    theirs = qwen2_vl.hf_model(model, "eager")
    pointers = {x.data_ptr() for x in model.state_dict().values()}
    assert {x.data_ptr() for x in theirs.parameters()} == pointers
    assert not any(x.is_meta for x in theirs.buffers())
