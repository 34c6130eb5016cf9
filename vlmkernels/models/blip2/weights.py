"""BLIP-2's checkpoints. The model's own names are those of the published Hugging Face files."""

from __future__ import annotations


def own_name(stored: str) -> str:
    """The published name of a stored tensor; "" for what is no weight."""
    # Older files hold the running index of a table of positions.
    return "" if stored.endswith(".position_ids") else stored
