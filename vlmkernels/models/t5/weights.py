"""T5's checkpoints. The model's own names are the published ones."""

from __future__ import annotations

from .config import T5Config


def own_name(stored: str) -> str:
    """The published name; "" for a table that old files hold and that was never used."""
    return "" if stored.endswith("EncDecAttention.relative_attention_bias.weight") else stored


def tied_names(config: T5Config) -> dict[str, str]:
    """Names that files may hold besides those of `T5Language`."""
    names = ["encoder.embed_tokens", "decoder.embed_tokens"]
    names += ["lm_head"] if config.tie_word_embeddings else []
    return {f"{name}.weight": "shared.weight" for name in names}
