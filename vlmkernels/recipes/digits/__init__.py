"""A small Qwen2-VL that reads scanned digits: the recipe that made it, and the demo."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The trained model that ships with the package, a directory in the published layout."""
