"""Qwen2.5-VL processor: Qwen2-VL's, and the seconds that a step of each video lasts."""

from __future__ import annotations

from vlmkernels.models.qwen2_vl.processor import Qwen2VLProcessor


class Qwen25VLProcessor(Qwen2VLProcessor):
    """As `Qwen2VLProcessor`; with videos it gives second_per_grid_ts (num_videos,) float32 too."""

    processor_class = "Qwen2_5_VLProcessor"
    gives_seconds = True
