"""Rivals of clip_loss and siglip_loss: open_clip's modules, inf-cl, PyTorch in chunks."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from bench.rivals import NotSupportedError, rival

ROWS = 1024  # of a chunk


@functools.cache
def open_clip_loss() -> Any:
    """open_clip/loss.py by itself: the package would import torchvision and more."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise NotSupportedError("open_clip is not installed")
    path = Path(package.submodule_search_locations[0], "loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@rival("clip_loss", "open_clip", "open_clip")
def open_clip_clip(**inputs: Tensor) -> Any:
    return open_clip_loss().ClipLoss()(**inputs)


@rival("siglip_loss", "open_clip", "open_clip")
def open_clip_siglip(**inputs: Tensor) -> Any:
    return open_clip_loss().SigLipLoss()(**inputs)


@rival("clip_loss", "inf-cl", "inf_cl", needs_cuda=True)
def inf_cl(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Any:
    """One direction for each call."""
    from inf_cl import cal_flash_loss

    if image_features.shape[1] % 256:
        raise NotSupportedError("dim must be a multiple of 256")
    by_image = cal_flash_loss(image_features, text_features, scale=logit_scale)
    by_text = cal_flash_loss(text_features, image_features, scale=logit_scale)
    return (by_image.mean() + by_text.mean()) / 2


@rival("clip_loss", "torch in chunks")
def clip_in_chunks(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """No batch x batch matrix: chunks of rows, computed again in the backward."""

    def chunk(image: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        logits = (scale * image @ texts.t()).float()
        return logits.logsumexp(1), logits.logsumexp(0)

    parts = [
        checkpoint(chunk, image, text_features, logit_scale, use_reentrant=False)
        for image in image_features.split(ROWS)
    ]
    image_lse = torch.cat([rows for rows, _ in parts])
    text_lse = torch.stack([columns for _, columns in parts]).logsumexp(0)
    positive = logit_scale * (image_features * text_features).sum(1)
    return (image_lse + text_lse).mean() / 2 - positive.mean()


@rival("siglip_loss", "torch in chunks")
def siglip_in_chunks(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """As open_clip's chunk_size (after 3.3.0): chunks of rows, computed again in the backward."""

    def chunk(image: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return -logsigmoid(-(scale * image @ texts.t() + bias).float()).sum()

    inputs = (text_features, logit_scale, logit_bias)
    sums = [
        checkpoint(chunk, image, *inputs, use_reentrant=False)
        for image in image_features.split(ROWS)
    ]
    positive = logit_scale * (image_features * text_features).sum(1) + logit_bias
    return torch.stack(sums).sum() / len(image_features) - positive.mean()
