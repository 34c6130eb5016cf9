"""Qwen-VL's checkpoints: the names of its remote code, in which the tower is inside the decoder."""

from __future__ import annotations

# Published -> ours; all other names are equal.
_PREFIXES = (
    ("transformer.visual.", "visual."),
    ("transformer.wte.", "transformer.embed_tokens."),
    ("transformer.h.", "transformer.layers."),
)
# Constants that some files hold.
_NO_WEIGHTS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")


def own_name(stored: str) -> str:
    """The parameter that is stored under a published name; "" for what is no weight."""
    if stored.startswith("transformer.") and stored.endswith(_NO_WEIGHTS):
        return ""
    for published, own in _PREFIXES:
        if stored.startswith(published):
            return own + stored.removeprefix(published)
    return stored


def published_name(name: str) -> str:
    """The name under which a parameter is stored."""
    for published, own in _PREFIXES:
        if name.startswith(own):
            return published + name.removeprefix(own)
    return name
