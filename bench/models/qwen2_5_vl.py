"""Qwen2.5-VL from pixels to logits: as bench/models/qwen2_vl.py, with windows in the tower."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.case import Case
from bench.models.qwen2_vl import cases_of
from vlmkernels.models.qwen2_5_vl import Qwen25VLConfig


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    if device.startswith("cuda"):
        config = Qwen25VLConfig.preset("3B")
        yield from cases_of(config, (4, 1024, 64), "qwen25vl_3b", device, dtype)
    else:
        ids: dict[str, Any] = {"image_token_id": 8000, "video_token_id": 8001}
        ids |= {"vision_start_token_id": 8002, "bos_token_id": 8003, "eos_token_id": 8004}
        config = replace(Qwen25VLConfig.preset("3B"), num_hidden_layers=2, vocab_size=8192, **ids)
        config.vision.depth, config.vision.fullatt_block_indexes = 2, (1,)
        name = "qwen25vl_3b (2 layers each, vocabulary 8192)"
        yield from cases_of(config, (1, 192, 16), name, device, dtype)
