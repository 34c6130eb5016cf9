"""Qwen2.5-VL: Qwen2-VL's splice and language model around another tower."""

from __future__ import annotations

from vlmkernels.models.qwen2_vl.model import Qwen2VL

from .config import Qwen25VLConfig
from .vision import Qwen25VLVision


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL (arXiv 2502.13923) with the published parameter names.

    As `Qwen2VL`; `second_per_grid_ts` makes the positions of videos count time: a step of a video
    lasts so many seconds, and a second is vision_config.tokens_per_second positions long.
    """

    config_class = Qwen25VLConfig
    vision_class = Qwen25VLVision
