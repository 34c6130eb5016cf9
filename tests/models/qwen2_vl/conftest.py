"""A small random checkpoint written by transformers itself, with a tokenizer made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.models.common import randomize
from vlmkernels.models import load, load_processor
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
CORPUS = [
    "What is in the picture? Describe the two videos.",
    "user assistant system",
    "café 数字 ½",
]
# Published with Qwen2-VL-Instruct (chat_template.json), without its picture counters.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(path: Path) -> Tokenizer:
    """A byte-level BPE of 320 tokens with the special tokens of Qwen2-VL."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>"},
        "padding_side": "left",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return backend


def hf_config(backend: Tokenizer, **text: object) -> transformers.Qwen2VLConfig:
    ids = {name: backend.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    return transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 3, 3],
            },
            "bos_token_id": None,
            "eos_token_id": backend.token_to_id("<|im_end|>"),
            "pad_token_id": backend.token_to_id("<|endoftext|>"),
            **text,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=backend.token_to_id("<|vision_start|>"),
        vision_end_token_id=backend.token_to_id("<|vision_end|>"),
    )


def write(path: Path) -> None:
    """A complete checkpoint directory: weights and configs by transformers, and a tokenizer."""
    model = transformers.Qwen2VLForConditionalGeneration(hf_config(write_tokenizer(path)))
    randomize(model)
    model.save_pretrained(path)
    processor = transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16)
    processor.save_pretrained(path)


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen2_vl")
    write(path)
    return path


@pytest.fixture(scope="session")
def hf_model(checkpoint_dir: Path) -> transformers.Qwen2VLForConditionalGeneration:
    return transformers.Qwen2VLForConditionalGeneration.from_pretrained(checkpoint_dir).eval()


@pytest.fixture(scope="session")
def model(checkpoint_dir: Path) -> Qwen2VL:
    return load(checkpoint_dir)


@pytest.fixture(scope="session")
def processor(checkpoint_dir: Path) -> Qwen2VLProcessor:
    return load_processor(checkpoint_dir)
