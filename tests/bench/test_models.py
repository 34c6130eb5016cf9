"""The end-to-end bench: both models compute the same with the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from bench.measure import measure
from bench.models import blip2, clip, llava, qwen2_vl, qwen_vl, vit
from bench.whole import same_weights
from tests.models.blip2.conftest import QFORMER, TEXT, VISION
from vlmkernels.models.blip2 import Blip2Config
from vlmkernels.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from vlmkernels.models.llava import LlavaConfig, LlavaTextConfig
from vlmkernels.models.qwen2_5_vl import Qwen25VLConfig, Qwen25VLVisionConfig
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLConfig, Qwen2VLVisionConfig
from vlmkernels.models.qwen_vl import QwenVisionConfig, QwenVLConfig
from vlmkernels.models.vit import ViT, ViTConfig


def vars_of_qwen2_vl() -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mrope_section": (2, 3, 3)}
    ids = {"image_token_id": 1500, "video_token_id": 1501, "vision_start_token_id": 1502}
    ids |= {"bos_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": 1600, **sizes, **heads, **ids}


@pytest.fixture
def config() -> Qwen2VLConfig:
    vision = Qwen2VLVisionConfig(depth=2, embed_dim=64, num_heads=4, hidden_size=64, mlp_ratio=2)
    return Qwen2VLConfig(**vars_of_qwen2_vl(), vision=vision)


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


def tiny_cases() -> dict[str, Any]:
    """Every other model's bench, with sizes that cost nothing."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tower = sizes | {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = ClipTextConfig(**sizes, num_attention_heads=2, vocab_size=8192, eos_token_id=8191)
    clip_config = ClipConfig(24, text=text, vision=ClipVisionConfig(**tower))
    words = LlavaTextConfig(**sizes, num_attention_heads=2, vocab_size=8192, eos_token_id=None)
    llava_config = LlavaConfig(8000, text=words, vision=ClipVisionConfig(**tower))
    vision = Qwen25VLVisionConfig(
        depth=2, hidden_size=32, intermediate_size=44, num_heads=2, out_hidden_size=64,
        fullatt_block_indexes=(1,),
    )  # fmt: skip
    qwen_config = Qwen25VLConfig(**vars_of_qwen2_vl(), vision=vision)
    visual = QwenVisionConfig(28, 14, 32, 2, 2, 2.0, 128, 4, image_start_id=8000)
    first_qwen = QwenVLConfig(8192, 128, 96, 2, 2, 64, seq_length=8, visual=visual)
    on = ("tiny", "cpu", torch.float32)
    text = TEXT["opt"] | {"vocab_size": 8192}
    raw = {"vision_config": VISION, "qformer_config": QFORMER, "text_config": text}
    blip2_config = Blip2Config.from_dict(raw | {"num_query_tokens": 4, "image_token_index": 8000})
    return {
        "blip2": lambda: blip2.cases_of(blip2_config, (2, 5), *on),
        "vit": lambda: vit.cases_of(ViTConfig(**tower, num_labels=5), 2, *on),
        "clip": lambda: clip.cases_of(clip_config, 2, *on),
        "llava": lambda: llava.cases_of(llava_config, (2, 5), *on),
        "qwen_vl": lambda: qwen_vl.cases_of(first_qwen, (2, 12), *on),
        "qwen2_5_vl": lambda: qwen2_vl.cases_of(qwen_config, (2, 12, 4), *on),
    }


@pytest.mark.parametrize("name", ["vit", "blip2", "clip", "llava", "qwen_vl", "qwen2_5_vl"])
def test_every_model_computes_what_its_rivals_do(name: str) -> None:
    ceiling = {"copy_gbps": 1.0, "gemm_tflops": 1.0}
    rows = [measure(case, ceiling, rounds=1) for case in tiny_cases()[name]()]
    assert {row["op"] for row in rows} == {name}
    assert "train step" in {row["direction"] for row in rows}
    for row in rows:
        assert row["error"] < 1e-5
        sdpa = next(rival for other, rival in row["rivals"].items() if other.endswith("SDPA"))
        assert sdpa["error"] < 1e-5
        assert row["tokens_per_s"] > 0


def test_the_three_models_share_their_tensors() -> None:
    config = ViTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, num_labels=3)
    theirs = transformers.ViTForImageClassification
    models = same_weights(ViT, config, theirs, "cpu", torch.float32)
    pointers = [{p.data_ptr() for p in model.parameters()} for model in models.values()]
    assert pointers[0] == pointers[1] == pointers[2]
    kinds = [models[name].config._attn_implementation for name in ("eager", "transformers SDPA")]
    assert kinds == ["eager", "sdpa"]


def test_transformers_model_shares_our_tensors(config: Qwen2VLConfig) -> None:
    model = Qwen2VL(config)
    theirs = qwen2_vl.hf_model(model, "eager")
    pointers = {x.data_ptr() for x in model.state_dict().values()}
    assert {x.data_ptr() for x in theirs.parameters()} == pointers
    assert not any(x.is_meta for x in theirs.buffers())
