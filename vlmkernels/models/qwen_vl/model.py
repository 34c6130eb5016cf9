"""Qwen-VL: the tower's tokens in the places between <img> and </img>."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmkernels.models.checkpoint import GENERATION_CONFIG, Json
from vlmkernels.models.llava.model import LlavaInputs
from vlmkernels.models.pretrained import read_generation_config
from vlmkernels.models.vlm import VLM, Embedded, VLMOutput, embed_text, embedded, looks_at, splice
from vlmkernels.nn.qformer_attention import sincos_positions

from .config import QwenVLConfig
from .language import QwenLanguage
from .processor import CHAT_OPTIONS
from .vision import QwenVision
from .weights import own_name, published_name


class QwenVL(VLM):
    """Qwen-VL and Qwen-VL-Chat (arXiv 2308.12966).

    All rows go through the language model as one run of tokens: padding never reaches a kernel.
    In training a batch without images runs the tower on an empty one, times 0: every parameter gets
    a gradient on every rank.
    """

    config_class = QwenVLConfig
    inputs_class = LlavaInputs

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.visual = QwenVision(config.visual)
        self.transformer = QwenLanguage(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    @property
    def decoder(self) -> QwenLanguage:
        return self.transformer

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight

    def own_name(self, stored: str) -> str:
        return own_name(stored)

    def tied_names(self) -> Mapping[str, str]:
        return {}

    def published_state(self) -> Mapping[str, Tensor]:
        return {published_name(name): x for name, x in self.state_dict().items()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        positions = self.visual.attn_pool.pos_embed  # sines and cosines, not learned
        positions.copy_(sincos_positions(int(len(positions) ** 0.5), positions.shape[1]))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
    ) -> VLMOutput:
        """Logits of every token and, with labels, the loss; arguments as of `Llava.forward`.

        Args:
            input_ids: n_queries places between <img> and </img> for every image. What stands in
                them (the published tokenizer writes the image's path) is not looked at.
            position_ids: None for the running index, or (batch, seqlen): where it does not go up
                by one a new document starts, at position 0, and attention stays inside it.
            pixel_values: (num_images, 3, size, size), images of all rows in order.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        inputs = LlavaInputs(input_ids, attention_mask, position_ids, inputs_embeds, pixel_values)
        return self.run(inputs, labels, num_items_in_batch, logits_to_keep)

    def embed(self, inputs: LlavaInputs) -> Embedded:
        x = embed_text(inputs.input_ids, inputs.inputs_embeds, self.decoder)
        if inputs.input_ids is not None:
            x = self._splice_images(x, inputs.input_ids, inputs.pixel_values)
        return embedded(x, inputs.attention_mask, inputs.position_ids)

    def _splice_images(self, x: Tensor, ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        visual = self.config.visual
        here = image_places(ids, visual.image_start_id, visual.n_queries)
        if pixel_values is not None:
            return splice("image", x, here, self.image_features(pixel_values).flatten(0, 1))
        x = splice("image", x, here, None)
        if self.training:
            patch = visual.patch_size
            empty = torch.zeros(1, 3, patch, patch, device=x.device)
            x = x + self.image_features(empty).mean().to(x.dtype) * 0
        return x

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(num_images, 3, size, size) -> (num_images, n_queries, hidden_size)."""
        features: Tensor = self.visual(pixel_values)
        return features

    def other_configs(self, path: Path) -> dict[str, Json]:
        # How a conversation is written stands there too; the processor may have said it before.
        configs = super().other_configs(path)
        before = read_generation_config(path)
        said = {name: before[name] for name in CHAT_OPTIONS if name in before}
        return configs | {GENERATION_CONFIG: said | configs[GENERATION_CONFIG]}

    def _eos_token_ids(self, given: int | Sequence[int] | None) -> list[int]:
        """In ChatML a turn's tokens end it too: they follow <|endoftext|> in the vocabulary."""
        ids = super()._eos_token_ids(given)
        if given is None and self.generation_config.get("chat_format") == "chatml":
            ids += [i + more for i in ids for more in (1, 2)]  # <|im_start|>, <|im_end|>
        return ids


def image_places(ids: Tensor, image_start_id: int, n_queries: int) -> Tensor:
    """bool (batch, seqlen), True between <img> and </img>.

    ValueError (on the CPU, where ids are looked at) unless there are n_queries places in each pair.
    """
    starts, ends = ids == image_start_id, ids == image_start_id + 1
    inside = (starts.cumsum(1) > ends.cumsum(1)) & ~starts
    if looks_at(ids):
        first, last = starts.flatten().nonzero(), ends.flatten().nonzero()
        same = first.shape == last.shape
        if not same or bool((last - first != n_queries + 1).any()) or _crosses_rows(starts, ends):
            gaps = (last - first - 1).flatten().tolist() if same else "unpaired tags"
            raise ValueError(
                f"input_ids: expected {n_queries} places between <img> and </img>, got {gaps}"
            )
    return inside


def _crosses_rows(starts: Tensor, ends: Tensor) -> bool:
    return bool((starts.sum(1) != ends.sum(1)).any())
