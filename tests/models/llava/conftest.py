"""A small random checkpoint written by transformers itself, with a tokenizer made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.models.common import randomize
from vlmkernels.models import load, load_processor
from vlmkernels.models.llava import Llava, LlavaProcessor

SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
CORPUS = ["USER: What is in the picture? ASSISTANT: Describe the two images.", "a cat and a dog"]
# Published with llava-1.5-7b-hf (chat_template.json).
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def write_tokenizer(path: Path, special: list[str] = SPECIAL) -> Tokenizer:
    """Words with a mark at their start and a start token in front, as LLaMA's."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "padding_side": "left"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return backend


def write(path: Path, text: dict[str, Any] | None = None, **options: Any) -> Any:
    write_tokenizer(path)
    sizes = {"num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4}
    text_config = sizes | {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **(text or {}),
    }
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    options = {"image_token_index": 3, "image_seq_length": 16, "pad_token_id": 4} | options
    config = transformers.LlavaConfig(
        text_config=text_config, vision_config=vision_config, **options
    )
    hf_model = transformers.LlavaForConditionalGeneration(config)
    randomize(hf_model)
    hf_model.save_pretrained(path)
    crop = {"height": 32, "width": 32}
    transformers.LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(
        path
    )
    return hf_model.eval()


@pytest.fixture(scope="package")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    write(path)
    return path


@pytest.fixture(scope="package")
def hf_model(checkpoint_dir: Path) -> Any:
    return transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint_dir).eval()


@pytest.fixture(scope="package")
def model(checkpoint_dir: Path) -> Llava:
    return load(checkpoint_dir)


@pytest.fixture(scope="package")
def processor(checkpoint_dir: Path) -> LlavaProcessor:
    return load_processor(checkpoint_dir)
