"""CLIP: two towers into one space, similarities, contrastive loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vlmkernels.models.encoder import TowerConfig
from vlmkernels.models.output import Output
from vlmkernels.models.pretrained import Pretrained
from vlmkernels.models.vlm import expect_ids
from vlmkernels.nn import ClipLoss

from . import open_clip
from .config import ClipConfig, ClipTextConfig
from .towers import ClipText, ClipVision


@dataclass
class ClipOutput(Output):
    """Embeddings of unit length (num, projection_dim), and scale * cosine of every pair."""

    logits_per_image: Tensor  # (num_images, num_texts)
    logits_per_text: Tensor  # (num_texts, num_images)
    image_embeds: Tensor
    text_embeds: Tensor
    loss: Tensor | None = None


class Clip(Pretrained):
    """CLIP (arXiv 2103.00020) with the published parameter names and transformers' keywords."""

    config_class = ClipConfig
    config: ClipConfig

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = ClipText(config.text)
        self.vision_model = ClipVision(config.vision)
        dim = config.projection_dim
        self.visual_projection = nn.Linear(config.vision.hidden_size, dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.loss = ClipLoss()
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        interpolate_pos_encoding: bool = False,
    ) -> ClipOutput:
        """Similarities of all images with all texts; with return_loss, text i belongs to image i.

        Args:
            input_ids: (num_texts, seqlen) int64, each with its end-of-text token.
            pixel_values: (num_images, channels, height, width).
            attention_mask: (num_texts, seqlen), 0 on padding.
            return_loss: the contrastive loss (mean cross entropy of images over texts and of texts
                over images), by the module `loss`; `nn.ClipLoss(rank=..., world_size=...)` in its
                place goes over all processes.
            interpolate_pos_encoding: take images of another size than the config's.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        image = self.encode_image(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        text = self.encode_text(input_ids, attention_mask)
        scale = self.logit_scale.exp()
        per_text = scale * text @ image.T
        if return_loss and len(image) != len(text):
            raise ValueError(
                f"return_loss: expected a text for every image, got {len(text)} texts and "
                f"{len(image)} images"
            )
        loss = self.loss(image, text, scale) if return_loss else None
        return ClipOutput(per_text.T, per_text, image, text, loss)

    def encode_image(
        self,
        pixel_values: Tensor,
        *,
        normalize: bool = True,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """(num_images, projection_dim) embeddings, of unit length unless normalize is False."""
        y: Tensor = self.visual_projection(
            self.vision_model(pixel_values, interpolate_pos_encoding)
        )
        return unit(y) if normalize else y

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, normalize: bool = True
    ) -> Tensor:
        """(num_texts, projection_dim) embeddings, of unit length unless normalize is False."""
        expect_ids(input_ids, self.config.text.vocab_size)
        limit = self.config.text.max_position_embeddings
        if input_ids.shape[1] > limit:
            raise ValueError(
                f"input_ids: expected at most {limit} tokens, got {input_ids.shape[1]}"
            )
        _, pooled = self.text_model(input_ids, attention_mask)
        y: Tensor = self.text_projection(pooled)
        return unit(y) if normalize else y

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal with the standard deviations of the original code; biases 0, norm weights 1."""
        towers: tuple[tuple[nn.Module, TowerConfig], ...] = (
            (self.vision_model, self.config.vision),
            (self.text_model, self.config.text),
        )
        for tower, config in towers:
            for name, parameter in tower.named_parameters():
                if (std := _init_std(name, config)) is not None:
                    parameter.normal_(std=std)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        self.visual_projection.weight.normal_(std=self.config.vision.hidden_size**-0.5)
        self.text_projection.weight.normal_(std=self.config.text.hidden_size**-0.5)
        self.logit_scale.fill_(self.config.logit_scale_init_value)

    def own_name(self, stored: str) -> str:
        # Older files hold the running index as a tensor.
        return "" if stored.endswith(".position_ids") else stored

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """The model of a directory in the Hugging Face layout, else in open_clip's."""
        if open_clip.is_directory(path):
            model = cls.on_meta(open_clip.read_config(path))
            open_clip.load(model, path, **options)
            return model.eval()
        return super().from_pretrained(path, **options)

    def save_open_clip(self, path: str | Path) -> None:
        """Write open_clip_config.json and open_clip_model.safetensors."""
        open_clip.save(self, Path(path))


def _init_std(name: str, tower: TowerConfig) -> float | None:
    """Of a tower's parameter; None for biases and norms."""
    width, kind = tower.hidden_size, name.split(".")[-2:]
    if kind[-1] == "class_embedding":
        return float(width**-0.5)
    if kind[-1] == "bias" or "norm" in kind[0]:
        return None
    stds = {
        "token_embedding": 0.02,
        "position_embedding": 0.01 if isinstance(tower, ClipTextConfig) else width**-0.5,
        "patch_embedding": 0.02,
        "out_proj": (2 * tower.num_hidden_layers * width) ** -0.5,
        "fc1": (2 * width) ** -0.5,
        "fc2": (2 * tower.num_hidden_layers * width) ** -0.5,
    }
    return float(stds.get(kind[0], width**-0.5))  # q, k, v


def unit(x: Tensor) -> Tensor:
    y: Tensor = x / x.norm(dim=-1, keepdim=True)
    return y
