"""LLaVA-1.5: CLIP features, projected, in the places of <image> tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vlmkernels.models.decoder import PackedDecoder
from vlmkernels.models.vlm import VLM, Embedded, VLMOutput, embed_text, embedded, splice

from .config import LlavaConfig
from .language import LlavaLanguage
from .projector import Projector
from .vision import LlavaVision
from .weights import own_name


@dataclass
class LlavaInputs:
    """What a prompt is made of; the arguments of `Llava.forward`, where they are described."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    pixel_values: Tensor | None = None


class Llava(VLM):
    """LLaVA-1.5 (arXiv 2310.03744) with the published parameter names and transformers' keywords.

    All rows go through the language model as one run of tokens: padding never reaches a kernel.
    """

    config_class = LlavaConfig
    inputs_class = LlavaInputs

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.vision_tower = LlavaVision(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = LlavaLanguage(config)
        self.reset_parameters()

    @property
    def decoder(self) -> PackedDecoder:
        return self.language_model.model

    @property
    def head_weight(self) -> Tensor:
        tied, language = self.config.tie_word_embeddings, self.language_model
        weight: Tensor = language.model.embed_tokens.weight if tied else language.lm_head.weight
        return weight

    def own_name(self, stored: str) -> str:
        return own_name(stored)

    def tied_names(self) -> Mapping[str, str]:
        tied = self.config.tie_word_embeddings
        embedding = "language_model.model.embed_tokens.weight"
        return {"language_model.lm_head.weight": embedding} if tied else {}

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
        """Logits of every token and, with labels, the loss.

        Args:
            input_ids: (batch, seqlen) int64; or `inputs_embeds` (batch, seqlen, hidden_size).
            attention_mask: (batch, seqlen), 0 on padding, on either side.
            position_ids: None for the running index, or (batch, seqlen): where it does not go up
                by one a new document starts, and attention stays inside it.
            labels: (batch, seqlen), shifted here; -100 does not count. A token is never
                predicted from padding.
            pixel_values: (num_images, 3, height, width), images of all rows in order. There must
                be as many <image> tokens in `input_ids` as features.
            num_items_in_batch: divides the summed loss instead of the number of labels.
            logits_to_keep: compute logits of the last so many columns only; 0 for all.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        inputs = LlavaInputs(input_ids, attention_mask, position_ids, inputs_embeds, pixel_values)
        return self.run(inputs, labels, num_items_in_batch, logits_to_keep)

    def embed(self, inputs: LlavaInputs) -> Embedded:
        ids = inputs.input_ids
        x = embed_text(ids, inputs.inputs_embeds, self.decoder)
        if ids is not None:
            pixels = inputs.pixel_values
            rows = None if pixels is None else self.image_features(pixels).flatten(0, 1)
            x = splice("image", x, ids == self.config.image_token_index, rows)
        return embedded(x, inputs.attention_mask, inputs.position_ids)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(num_images, 3, height, width) -> (num_images, num_features, text hidden_size)."""
        features: Tensor = self.multi_modal_projector(self.vision_tower(pixel_values))
        return features
