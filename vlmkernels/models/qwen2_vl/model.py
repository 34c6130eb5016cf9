"""Qwen2-VL: vision tower, language model, and the splice of one into the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmkernels.models.packing import expect_grid
from vlmkernels.models.vlm import VLM, Embedded, VLMOutput, embed_text, splice

from .config import Qwen2VLConfig
from .language import Qwen2VLLanguage
from .positions import mrope_position_ids
from .vision import Qwen2VLVision
from .weights import published_name


@dataclass
class Qwen2VLInputs:
    """What a prompt is made of; the arguments of `Qwen2VL.forward`, where they are described."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    pixel_values: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    image_grid_thw: Tensor | None = None
    video_grid_thw: Tensor | None = None
    mm_token_type_ids: Tensor | None = None
    second_per_grid_ts: Tensor | None = None


class Qwen2VL(VLM):
    """Qwen2-VL (arXiv 2409.12191) with the published parameter names and transformers' keywords.

    `model(input_ids, pixel_values=..., image_grid_thw=..., labels=...)` returns `.logits` and
    `.loss`. All images of a batch go through the vision tower as one run of patches, all rows
    through the language model as one run of tokens: padding never reaches a kernel.
    """

    config_class = Qwen2VLConfig
    inputs_class = Qwen2VLInputs
    vision_class: ClassVar[Any] = Qwen2VLVision

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__(config)
        self.visual = self.vision_class(config.vision)
        self.model = Qwen2VLLanguage(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    @property
    def decoder(self) -> Qwen2VLLanguage:
        return self.model

    @property
    def head_weight(self) -> Tensor:
        tied = self.config.tie_word_embeddings
        weight: Tensor = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return weight

    def own_name(self, stored: str) -> str:
        return published_name(stored)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
    ) -> VLMOutput:
        """Logits of every token and, with labels, the loss.

        Args:
            input_ids: (batch, seqlen) int64; or `inputs_embeds` (batch, seqlen, hidden_size).
            attention_mask: (batch, seqlen), 0 on padding, on either side.
            position_ids: None for the published rule, (batch, seqlen), (3, batch, seqlen), or
                (4, batch, seqlen) whose first row is the running index of the token: where it
                does not go up by one a new document starts, and attention stays inside it.
            labels: (batch, seqlen), shifted here; -100 does not count. A token is never
                predicted from padding.
            pixel_values, image_grid_thw: patch rows of all images, (num_images, 3) grids; the
                same for videos. The placeholders in `input_ids` must be as many as the rows.
            mm_token_type_ids: accepted and not needed; `input_ids` say it.
            second_per_grid_ts: (num_videos,) seconds of a step of each video; Qwen2.5-VL only.
            num_items_in_batch: divides the summed loss instead of the number of labels.
            logits_to_keep: compute logits of the last so many columns only; 0 for all.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        inputs = Qwen2VLInputs(
            *(input_ids, attention_mask, position_ids, inputs_embeds),
            *(pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw),
            *(mm_token_type_ids, second_per_grid_ts),
        )
        return self.run(inputs, labels, num_items_in_batch, logits_to_keep)

    def embed(self, inputs: Qwen2VLInputs) -> Embedded:
        ids, mask = inputs.input_ids, inputs.attention_mask
        x = embed_text(ids, inputs.inputs_embeds, self.model)
        expect_grid("attention_mask", mask, x)
        if ids is not None:
            x = self._splice_pictures(x, ids, inputs)
        position_ids = inputs.position_ids
        if position_ids is None:
            # In embeddings no placeholder can be found: they count as text.
            ids = torch.full(x.shape[:2], -1, device=x.device) if ids is None else ids
            position_ids = self._position_ids(ids, inputs)
        position_ids, text_positions = _split_positions(position_ids, x)
        return Embedded(x, position_ids, mask, text_positions)

    def _position_ids(self, ids: Tensor, inputs: Qwen2VLInputs) -> Tensor:
        vision, seconds = self.config.vision, inputs.second_per_grid_ts
        videos = inputs.video_grid_thw
        if seconds is not None and vision.tokens_per_second is None:
            raise ValueError("second_per_grid_ts: expected None, Qwen2-VL counts steps of a video")
        if seconds is not None and len(seconds) != (0 if videos is None else len(videos)):
            raise ValueError(f"second_per_grid_ts: expected one per video, got {len(seconds)}")
        position_ids, _ = mrope_position_ids(
            ids,
            image_token_id=self.config.image_token_id,
            video_token_id=self.config.video_token_id,
            image_grid_thw=inputs.image_grid_thw,
            video_grid_thw=inputs.video_grid_thw,
            attention_mask=inputs.attention_mask,
            merge_size=vision.spatial_merge_size,
            second_per_grid_ts=seconds,
            tokens_per_second=vision.tokens_per_second,
        )
        return position_ids

    def _splice_pictures(self, x: Tensor, ids: Tensor, inputs: Qwen2VLInputs) -> Tensor:
        image_id, video_id = self.config.image_token_id, self.config.video_token_id
        for name, token_id, pixels, grid_thw in (
            ("image", image_id, inputs.pixel_values, inputs.image_grid_thw),
            ("video", video_id, inputs.pixel_values_videos, inputs.video_grid_thw),
        ):
            if (pixels is None) != (grid_thw is None):
                raise ValueError(f"{name}_grid_thw: expected together with the pixel values")
            rows = None if pixels is None else self.visual(pixels, grid_thw)
            x = splice(name, x, ids == token_id, rows)
        return x


def _split_positions(position_ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(3, batch, seqlen) positions, and the running indices when there are four rows."""
    if position_ids.ndim == 2:
        position_ids = position_ids.expand(3, -1, -1)
    shapes = [(n, x.shape[0], x.shape[1]) for n in (3, 4)]
    if tuple(position_ids.shape) not in shapes:
        raise ValueError(
            f"position_ids: expected shape {x.shape[:2]}, {shapes[0]} or {shapes[1]}, "
            f"got {tuple(position_ids.shape)}"
        )
    return position_ids[-3:], position_ids[0] if len(position_ids) == 4 else None
