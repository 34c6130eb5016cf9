"""Small random checkpoints written by transformers itself, with tokenizers made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.models.common import randomize
from vlmkernels.models import load, load_processor
from vlmkernels.models.blip2 import Blip2OPT, Blip2Processor, Blip2T5

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


# Where each language model has its special tokens, and what it puts around a text.
SPECIAL = {
    "opt": ["<s>", "<pad>", "</s>", "<unk>", "<image>"],
    "t5": ["<pad>", "</s>", "<unk>", "<image>"],
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
}
AROUND = {"opt": "</s> $A", "t5": "$A </s>", "bert": "[CLS] $A [SEP]"}
CORPUS = ["Question: what is in the picture? Answer: a cat and a dog. " * 3, "two red cars"]
TEXT: dict[str, dict[str, Any]] = {
    "opt": {
        "model_type": "opt",
        "vocab_size": 160,
        "hidden_size": 40,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 40,
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": 160,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "decoder_start_token_id": 0,
    },
}


def write_tokenizer(path: Path, kind: str) -> None:
    special = SPECIAL[kind]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    around = AROUND[kind]
    used = [(token, special.index(token)) for token in around.split() if token in special]
    backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    pad, end = ("[PAD]", "[SEP]") if kind == "bert" else ("<pad>", "</s>")
    config = {"pad_token": pad, "eos_token": end, "padding_side": "left"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    transformers.BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)


def write(path: Path, kind: str, **text: Any) -> None:
    write_tokenizer(path, kind)
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=TEXT[kind] | text,
        num_query_tokens=4,
        image_token_index=SPECIAL[kind].index("<image>"),
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(path)
    if kind == "t5":  # transformers ties them unless both are in the file
        file = path / "model.safetensors"
        head = torch.randn(160, 32, generator=torch.Generator().manual_seed(3)) * 0.2
        state = load_file(file) | {"language_model.lm_head.weight": head}
        save_file(state, file, {"format": "pt"})


@pytest.fixture(scope="package", params=["opt", "t5"])
def checkpoint_dir(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    write(path, request.param)
    return path


@pytest.fixture(scope="package")
def hf_model(checkpoint_dir: Path) -> Any:
    hf = transformers.Blip2ForConditionalGeneration.from_pretrained(checkpoint_dir).eval()
    head, words = hf.language_model.lm_head.weight, hf.language_model.get_input_embeddings().weight
    assert (head is words) == (hf.config.text_config.model_type == "opt")
    return hf


@pytest.fixture(scope="package")
def model(checkpoint_dir: Path) -> Blip2OPT | Blip2T5:
    return load(checkpoint_dir)


@pytest.fixture(scope="package")
def processor(checkpoint_dir: Path) -> Blip2Processor:
    return load_processor(checkpoint_dir)
