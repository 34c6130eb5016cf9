"""Qwen2-VL: vision tower, language model, and the splice of one into the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.models.cache import KVCache
from vlmkernels.models.checkpoint import Json
from vlmkernels.models.generation import DecodeState, Generates
from vlmkernels.models.packing import Packing, expect_grid, make_packing

from .config import Qwen2VLConfig
from .language import Qwen2VLLanguage, next_token_loss
from .positions import mrope_position_ids
from .vision import Qwen2VLVision
from .weights import Qwen2VLWeights


@dataclass
class Qwen2VLOutput:
    """logits (batch, seqlen, vocab_size), zeros on padding; loss () when labels were given."""

    logits: Tensor
    loss: Tensor | None = None


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


class Qwen2VL(Generates, Qwen2VLWeights, nn.Module):
    """Qwen2-VL (arXiv 2409.12191) with the published parameter names and transformers' keywords.

    `model(input_ids, pixel_values=..., image_grid_thw=..., labels=...)` returns `.logits` and
    `.loss`. All images of a batch go through the vision tower as one run of patches, all rows
    through the language model as one run of tokens: padding never reaches a kernel.
    """

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_config: Json = {}
        self.visual = Qwen2VLVision(config.vision)
        self.model = Qwen2VLLanguage(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

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
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
    ) -> Qwen2VLOutput:
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
            num_items_in_batch: divides the summed loss instead of the number of labels.
            logits_to_keep: compute logits of the last so many columns only; 0 for all.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        if labels is not None and logits_to_keep:
            raise ValueError("logits_to_keep: expected 0 with labels, the loss needs all logits")
        inputs = Qwen2VLInputs(
            *(input_ids, attention_mask, position_ids, inputs_embeds),
            *(pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw, mm_token_type_ids),
        )
        x, position_ids, text_positions = self._embed(inputs)
        expect_grid("labels", labels, x)
        packing = make_packing(x.shape[0], x.shape[1], x.device, attention_mask, text_positions)
        h = self._hidden_states(x, position_ids, packing)
        if logits_to_keep:
            return Qwen2VLOutput(self._head(packing.unpack(h)[:, -logits_to_keep:]))
        logits = self._head(h)
        loss = None
        if labels is not None:
            loss = next_token_loss(logits, packing.pack(_shift(labels)), num_items_in_batch)
        return Qwen2VLOutput(packing.unpack(logits), loss)

    @torch.inference_mode()
    def prefill(self, max_new_tokens: int, **inputs: Any) -> tuple[Tensor, DecodeState]:
        """See `vlmkernels.models.generation.Generates`; `inputs` as of `forward`."""
        given = Qwen2VLInputs(**inputs)
        x, position_ids, text_positions = self._embed(given)
        if text_positions is not None:
            raise ValueError("position_ids: expected 3 rows, generation continues one document")
        packing = make_packing(x.shape[0], x.shape[1], x.device, given.attention_mask)
        if not bool(packing.cu_seqlens.diff().all()):
            raise ValueError("attention_mask: expected a token in every row, got a row of padding")
        cache = KVCache(
            *(self.config.num_hidden_layers, x.shape[0], packing.max_seqlen + max_new_tokens),
            *(self.config.num_heads_k, self.config.head_dim),
            dtype=x.dtype,
            device=x.device,
        )
        cache.start(packing)
        h = self._hidden_states(x, position_ids, packing, cache)
        if given.attention_mask is not None:
            position_ids = position_ids.masked_fill(given.attention_mask == 0, 0)
        state = DecodeState(cache, position_ids.amax(dim=(0, 2)) + 1)
        return self._head(h[packing.cu_seqlens[1:] - 1]), state

    @torch.inference_mode()
    def decode(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """See `vlmkernels.models.generation.Generates`."""
        packing = make_packing(len(tokens), 1, tokens.device)
        state.cache.advance()
        position_ids = state.next_positions.expand(3, -1).contiguous()
        x = self.model.embed_tokens(tokens)
        h = self.model(x, position_ids, packing.cu_seqlens, packing.max_seqlen, state.cache)
        state.next_positions = state.next_positions + 1
        return self._head(h)

    def _embed(self, inputs: Qwen2VLInputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Token embeddings with the pictures in their places, positions, and running indices.

        (batch, seqlen, hidden_size), (3, batch, seqlen), and (batch, seqlen) or None.
        """
        ids, x = inputs.input_ids, inputs.inputs_embeds
        if (ids is None) == (x is None):
            raise ValueError("input_ids: expected exactly one of input_ids and inputs_embeds")
        if ids is not None:
            x = self._embed_ids(ids, inputs)
        assert x is not None
        if x.ndim != 3 or x.numel() == 0:
            raise ValueError(f"inputs_embeds: expected 3 dimensions, got shape {tuple(x.shape)}")
        expect_grid("attention_mask", inputs.attention_mask, x)
        position_ids = inputs.position_ids
        if position_ids is None:
            position_ids, _ = mrope_position_ids(
                # In embeddings no placeholder can be found: they count as text.
                ids if ids is not None else torch.full(x.shape[:2], -1, device=x.device),
                image_token_id=self.config.image_token_id,
                video_token_id=self.config.video_token_id,
                image_grid_thw=inputs.image_grid_thw,
                video_grid_thw=inputs.video_grid_thw,
                attention_mask=inputs.attention_mask,
                merge_size=self.config.vision.spatial_merge_size,
            )
        return x, *_split_positions(position_ids, x)

    def _embed_ids(self, ids: Tensor, inputs: Qwen2VLInputs) -> Tensor:
        _check_ids(ids, self.config.vocab_size)
        x: Tensor = self.model.embed_tokens(ids)
        image_id, video_id = self.config.image_token_id, self.config.video_token_id
        for name, token_id, pixels, grid_thw in (
            ("image", image_id, inputs.pixel_values, inputs.image_grid_thw),
            ("video", video_id, inputs.pixel_values_videos, inputs.video_grid_thw),
        ):
            if (pixels is None) != (grid_thw is None):
                raise ValueError(f"{name}_grid_thw: expected together with the pixel values")
            here = ids == token_id
            if pixels is not None:
                x = _splice(name, x, here, self.visual(pixels, grid_thw))
            elif (
                here.device.type == "cpu" and here.any()
            ):  # on a GPU this would stall every text batch
                raise ValueError(f"pixel values: expected for {here.sum()} {name} tokens, got None")
        return x

    def _hidden_states(
        self, x: Tensor, position_ids: Tensor, packing: Packing, cache: KVCache | None = None
    ) -> Tensor:
        """(batch, seqlen, hidden_size), (3, batch, seqlen) -> packed (num_tokens, hidden_size)."""
        positions = packing.pack(position_ids.permute(1, 2, 0)).T.contiguous()
        h: Tensor = self.model(
            packing.pack(x), positions, packing.cu_seqlens, packing.max_seqlen, cache
        )
        return h

    def _head(self, h: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocab_size)"""
        tied = self.config.tie_word_embeddings
        weight = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return torch.nn.functional.linear(h, weight)

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """Keep only each layer's inputs for the backward pass and compute the rest again there."""
        self.visual.gradient_checkpointing = self.model.gradient_checkpointing = enable

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Matrices N(0, initializer_range), biases 0, norm weights 1."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=self.config.initializer_range)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids: expected int32 or int64, got {ids.dtype}")
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"input_ids: expected shape (batch, seqlen), got {tuple(ids.shape)}")
    # On a GPU the values are not looked at: that would stall every batch.
    if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"input_ids: expected in [0, {vocab_size}), got {int(ids.min())} to {int(ids.max())}"
        )


def _splice(name: str, x: Tensor, here: Tensor, rows: Tensor) -> Tensor:
    """x with `rows` (num_tokens, hidden_size) in the places `here` (batch, seqlen) marks."""
    num_tokens = int(here.sum())
    if num_tokens != len(rows):
        raise ValueError(
            f"input_ids: expected {len(rows)} {name} tokens (the merged patches), got {num_tokens}"
        )
    return x.masked_scatter(here.unsqueeze(-1), rows.to(x.dtype))


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


def _shift(labels: Tensor) -> Tensor:
    """Each place gets the label of the next one, the last -100."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
