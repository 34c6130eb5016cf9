"""LLaVA-1.5's checkpoints. The model's own names are those of the published llava-hf files."""

from __future__ import annotations

# What newer transformers writes or calls it in memory -> the published name.
_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
_TOWER, _NESTED = "vision_tower.", "vision_tower.vision_model."
_NO_WEIGHTS = (".position_ids", ".rotary_emb.inv_freq")  # older files hold these constants


def own_name(stored: str) -> str:
    """The published name of a stored tensor; "" for what is no weight."""
    if stored.endswith(_NO_WEIGHTS):
        return ""
    for prefix, published in _PREFIXES:
        if stored.startswith(prefix):
            stored = published + stored.removeprefix(prefix)
            break
    if stored.startswith(_TOWER) and not stored.startswith(_NESTED):
        stored = _NESTED + stored.removeprefix(_TOWER)
    return stored
