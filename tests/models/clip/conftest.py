"""A small random checkpoint written by transformers itself, with a tokenizer made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.models.common import randomize

WORDS = ["a", "photo", "of", "cat", "dog", "the", "red", "car", ".", "picture", "two"]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


def make_tokenizer() -> Any:
    """CLIP's own tokenizer class over a dozen words and the single characters."""
    characters = "abcdefghijklmnopqrstuvwxyz."
    pieces = [*characters, *(f"{c}</w>" for c in characters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges += [(parts[0], parts[1])] if (parts[0], parts[1]) not in merges else []
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces += parts[:1] if parts[0] not in pieces else []
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def write(path: Path, **options: Any) -> Any:
    tokenizer = make_tokenizer()
    act = {"hidden_act": options.pop("hidden_act", "quick_gelu")}
    eos = options.pop("eos_token_id", tokenizer.eos_token_id)
    text = TOWER | act | {"vocab_size": len(tokenizer), "num_hidden_layers": 2}
    text |= {"max_position_embeddings": 16, "eos_token_id": eos}
    vision = TOWER | act | {"num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=24, **options
    )
    hf_model = transformers.CLIPModel(config)
    randomize(hf_model)
    hf_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    crop = {"height": 32, "width": 32}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop).save_pretrained(
        path
    )
    return hf_model.eval()


@pytest.fixture(scope="package")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    write(path)
    return path


@pytest.fixture(scope="package")
def hf_model(checkpoint_dir: Path) -> Any:
    return transformers.CLIPModel.from_pretrained(checkpoint_dir).eval()
