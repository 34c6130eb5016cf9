"""BLIP-2's published configs: sizes, names, sparse files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from tests.models.common import num_parameters
from vlmkernels.models.blip2 import Blip2, Blip2Config
from vlmkernels.models.blip2.config import GENERATION, PRESETS
from vlmkernels.models.t5 import T5Config

# Salesforce/blip2-opt-2.7b and -flan-t5-xl, config.json, as sparse as published.
VISION = {
    "dropout": 0.0,
    "initializer_factor": 1.0,
    "model_type": "blip_2_vision_model",
    "num_channels": 3,
    "projection_dim": 512,
}
OUTER: dict[str, Any] = {
    "architectures": ["Blip2ForConditionalGeneration"],
    "image_text_hidden_size": 256,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "model_type": "blip-2",
    "num_query_tokens": 32,
    "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer"},
    "torch_dtype": "float32",
    "vision_config": VISION,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "opt-2.7b": OUTER
    | {
        "image_token_index": 50265,
        "text_config": {
            "_name_or_path": "facebook/opt-2.7b",
            "activation_dropout": 0.0,
            "architectures": ["OPTForCausalLM"],
            "eos_token_id": 50118,
            "ffn_dim": 10240,
            "hidden_size": 2560,
            "model_type": "opt",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "prefix": "</s>",
            "torch_dtype": "float16",
            "vocab_size": 50304,
            "word_embed_proj_dim": 2560,
        },
        "use_decoder_only_language_model": True,
    },
    "flan-t5-xl": OUTER
    | {
        "image_token_index": 32100,
        "text_config": {
            "architectures": ["T5ForConditionalGeneration"],
            "bos_token_id": 1,
            "classifier_dropout": 0.0,
            "d_ff": 5120,
            "d_kv": 64,
            "d_model": 2048,
            "decoder_start_token_id": 0,
            "dense_act_fn": "gelu",
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "is_gated_act": True,
            "layer_norm_epsilon": 1e-06,
            "model_type": "t5",
            "n_positions": 512,
            "num_decoder_layers": 24,
            "num_heads": 32,
            "num_layers": 24,
            "pad_token_id": 0,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "tie_word_embeddings": False,
            "vocab_size": 32128,
        },
        "use_decoder_only_language_model": False,
    },
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_published_file_is_the_preset(name: str) -> None:
    config = Blip2Config.from_dict(PUBLISHED[name])
    assert config == Blip2Config.preset(name)
    assert config.bos_token_id == (1 if "t5" in name else 2)
    saved = config.to_dict()
    assert Blip2Config.from_dict(saved) == config
    parts = ("vision_config", "qformer_config", "text_config")
    for of, whole in ((saved, PUBLISHED[name]), *((saved[p], PUBLISHED[name][p]) for p in parts)):
        said = {k: v for k, v in whole.items() if k not in parts and v is not None}
        assert {k: of[k] for k in said} == said
    theirs = transformers.Blip2Config(**saved)
    again = Blip2Config.from_dict(theirs.to_dict() | {"architectures": [GENERATION]})
    assert again.vision == config.vision and again.qformer == config.qformer
    assert again.text is not None and again.text.eos_token_id == config.eos_token_id


@pytest.mark.parametrize(
    ("name", "image_size", "parameters"),
    [
        ("opt-2.7b", 224, 3_744_761_856),
        ("opt-2.7b", 364, 3_745_353_216),
        ("opt-6.7b", 224, 7_752_869_376),
        ("flan-t5-xl", 224, 3_942_446_592),
        ("flan-t5-xxl", 224, 12_229_596_672),
        ("itm-vit-g", 224, 1_172_032_258),
    ],
)
def test_published_sizes_have_the_published_parameters(
    name: str, image_size: int, parameters: int
) -> None:
    config = Blip2Config.preset(name, image_size=image_size)
    assert num_parameters(lambda: Blip2.new(config)) == parameters
    with torch.device("meta"):
        theirs = getattr(transformers, config.architecture)(
            transformers.Blip2Config(**config.to_dict())
        )
    names = {own for own, _ in theirs.named_parameters()}
    if isinstance(config.text, T5Config):  # transformers' config ties what the files do not
        names.add("language_model.lm_head.weight")
    assert Blip2.model_class(config).on_meta(config).state_dict().keys() == names
    assert name in PRESETS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": {"hidden_size": 1409}}, "vision_config.hidden_size: expected a mult"),
        ({"qformer_config": {"hidden_size": 770}}, "qformer_config.hidden_size: expected a mult"),
        ({"qformer_config": {"hidden_dropout_prob": 1.0}}, "hidden_dropout_prob: expected a num"),
        ({"qformer_config": [1]}, r"qformer_config: expected an object, got \[1\]"),
        ({"text_config": {"model_type": "llama"}}, r"expected one of \['opt', 't5'\], got 'llama'"),
        ({"text_config": {"do_layer_norm_before": False}}, "do_layer_norm_before: expected True"),
        ({"architectures": ["Blip2Model"]}, "architectures: expected one of .*, got 'Blip2Model'"),
        ({"num_query_tokens": 0}, "num_query_tokens: expected a positive integer"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Blip2Config.from_dict(json.loads(json.dumps(PUBLISHED["opt-2.7b"] | change)))


def test_a_prompt_needs_its_placeholder() -> None:
    raw = PUBLISHED["opt-2.7b"] | {"image_token_index": None}
    with pytest.raises(ValueError, match="image_token_index: expected the placeholder's id"):
        Blip2Config.from_dict(raw)
    with pytest.raises(ValueError, match="text_config: expected an OPT's, got NoneType"):
        Blip2.new(Blip2Config())
    with pytest.raises(ValueError, match="preset: expected one of"):
        Blip2Config.preset("opt-66b")
