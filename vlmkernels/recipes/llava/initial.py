"""What LLaVA-1.5's first stage starts from: a CLIP, a LLaMA and a new projector."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import Tensor

from vlmkernels.models.checkpoint import CONFIG, Json, read_json, read_tensors
from vlmkernels.models.clip import ClipVisionConfig
from vlmkernels.models.llava import (
    VICUNA_V1,
    Llava,
    LlavaConfig,
    LlavaProcessor,
    LlavaTextConfig,
    Projector,
)
from vlmkernels.models.llava.processor import LlavaImageSettings
from vlmkernels.models.pretrained import read_generation_config
from vlmkernels.models.tokenizer import Tokenizer

IMAGE, PAD = "<image>", "<pad>"
MULTIPLE = 64  # of the vocabulary, as published: 32064


def assemble(vision: Path, language: Path, out: Path, seed: int = 0) -> None:
    """Writes the checkpoint directory `out`, in the dtype of the LLaMA.

    vision: a CLIP's directory; language: a LLaMA's, with a tokenizer.json. The vocabulary gets
    <image> and <pad>, whose rows are the mean of all others; the projector is drawn as torch.nn's
    linear layers are, as in the original code.

    Raises:
        ValueError: another kind of model, weights that do not fit its config.
    """
    if (out / CONFIG).exists():
        raise ValueError(f"out: expected a new folder, got {out} with a model")
    tokenizer = Tokenizer.from_pretrained(language)
    tokenizer.backend.add_special_tokens([AddedToken(t, special=True) for t in (IMAGE, PAD)])
    config = _config(read_json(vision / CONFIG), read_json(language / CONFIG), tokenizer)
    state = {
        f"vision_tower.{n}": x for n, x in read_tensors(vision) if n.startswith("vision_model.")
    }
    state |= {f"language_model.{name}": x for name, x in read_tensors(language)}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in state:
            state[name] = _grown(state[name], config.text.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(config).state_dict()
    state |= {f"multi_modal_projector.{name}": x for name, x in projector.items()}
    model = Llava.on_meta(config)
    dtype = state["language_model.model.embed_tokens.weight"].dtype
    weights = {name: x.to(dtype) for name, x in state.items() if model.own_name(name)}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"vision, language: expected a CLIP and a LLaMA: {error}") from error
    model.generation_config = read_generation_config(language)
    model.save_pretrained(out)
    _processor(config, tokenizer).save_pretrained(out)


def _config(vision: Json, language: Json, tokenizer: Tokenizer) -> LlavaConfig:
    text = LlavaTextConfig.from_dict(language)
    text.vocab_size = -(-max(len(tokenizer), text.vocab_size) // MULTIPLE) * MULTIPLE
    text.pad_token_id = tokenizer.token_to_id(PAD)
    return LlavaConfig(
        image_token_index=tokenizer.token_to_id(IMAGE),
        tie_word_embeddings=bool(language.get("tie_word_embeddings")),
        text=text,
        vision=ClipVisionConfig.from_dict(vision.get("vision_config") or vision),
    )


def _grown(table: Tensor, rows: int) -> Tensor:
    """(vocab_size, hidden_size) with the mean below."""
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def _processor(config: LlavaConfig, tokenizer: Tokenizer) -> LlavaProcessor:
    tokenizer.config |= {"pad_token": PAD}
    edge = config.vision.image_size
    image = LlavaImageSettings(size=edge, crop_size=(edge, edge))
    chat = Tokenizer(tokenizer.backend, tokenizer.config, VICUNA_V1)
    return LlavaProcessor(chat, image, patch_size=config.vision.patch_size)
