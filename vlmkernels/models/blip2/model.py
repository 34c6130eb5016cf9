"""BLIP-2's second stage: what the queries read out of an image, projected, is where a language
model's prompt begins."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.models.generation import Generates
from vlmkernels.models.opt import OPTConfig, OPTDecoder, OPTLanguage
from vlmkernels.models.pretrained import PretrainedGenerator
from vlmkernels.models.t5 import Memory, T5Config, T5Language, T5State
from vlmkernels.models.t5 import tied_names as t5_tied_names
from vlmkernels.models.vlm import (
    VLM,
    Embedded,
    HasEmbedding,
    VLMOutput,
    embed_text,
    embedded,
    splice,
)

from .base import Blip2Base
from .config import GENERATION, RETRIEVAL, Blip2Config
from .pretraining import Blip2Pretraining
from .retrieval import Blip2Retrieval
from .weights import read_config


@dataclass
class Blip2Inputs:
    """What a prompt is made of; the arguments of `Blip2OPT.forward`, where they are described."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    inputs_embeds: Tensor | None = None
    pixel_values: Tensor | None = None
    interpolate_pos_encoding: bool = False


class Generative(Blip2Base, PretrainedGenerator):
    """The image side, and a linear layer from it to a language model."""

    architecture = GENERATION
    language_model: Any
    image_token_id: int

    def add_sides(self, config: Blip2Config, language_model: nn.Module, width: int) -> None:
        assert config.image_token_index is not None  # where there is a language model
        self.image_token_id = config.image_token_index
        self.add_image_side(config)
        self.language_projection = nn.Linear(config.qformer.hidden_size, width)
        self.language_model = language_model
        self.reset_parameters()

    @property
    @abstractmethod
    def words(self) -> HasEmbedding:
        """What has the embeddings of the language model."""

    def image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """(num_images, 3, height, width) -> (num_images, num_query_tokens, text width)."""
        queries = self.image_queries(self.vision_model(pixel_values, interpolate_pos_encoding))
        features: Tensor = self.language_projection(queries.to(self.dtype))
        return features

    def embed_prompt(self, inputs: Blip2Inputs) -> Tensor:
        """(batch, seqlen, text width), images in the places of their placeholders."""
        ids, embeds, pixels = inputs.input_ids, inputs.inputs_embeds, inputs.pixel_values
        if ids is None and embeds is None and pixels is not None:
            ids = self.start_ids(len(pixels))
        x = embed_text(ids, embeds, self.words)
        if ids is None:
            if pixels is not None:
                raise ValueError("pixel_values: expected None with inputs_embeds, got images")
            return x
        rows = None
        if pixels is not None:
            rows = self.image_features(pixels, inputs.interpolate_pos_encoding).flatten(0, 1)
        return splice("image", x, ids == self.image_token_id, rows)

    def start_ids(self, batch: int) -> Tensor:
        """(batch, num_query_tokens + 1): the prompt for a caption, placeholders and a start."""
        ids = [self.image_token_id] * self.config.num_query_tokens
        return torch.tensor([[*ids, self.config.bos_token_id]], device=self.device).repeat(batch, 1)


class Blip2OPT(VLM, Generative):
    """BLIP-2 on OPT, which goes on from the image and the prompt."""

    inputs_class = Blip2Inputs
    config: Blip2Config

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        text = config.text
        if not isinstance(text, OPTConfig):
            raise ValueError(f"text_config: expected an OPT's, got {type(text).__name__}")
        self.add_sides(config, OPTLanguage(text), text.hidden_size)

    @property
    def decoder(self) -> OPTDecoder:
        decoder: OPTDecoder = self.language_model.model.decoder
        return decoder

    @property
    def words(self) -> OPTDecoder:
        return self.decoder

    @property
    def head_weight(self) -> Tensor:
        weight: Tensor = self.language_model.head_weight
        return weight

    def tied_names(self) -> Mapping[str, str]:
        language = "language_model."
        if hasattr(self.language_model, "lm_head"):
            return {}
        return {f"{language}lm_head.weight": f"{language}model.decoder.embed_tokens.weight"}

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
    ) -> VLMOutput:
        """Logits of every token and, with labels, the loss.

        Args:
            pixel_values: (num_images, 3, height, width), images of all rows in order.
            input_ids: (batch, seqlen) int64, with num_query_tokens placeholders (the config's
                image_token_index) for each image; or `inputs_embeds` (batch, seqlen, hidden_size)
                without images; or neither: the prompt for a caption, placeholders and a start.
            attention_mask: (batch, seqlen), 0 on padding, anywhere.
            labels: (batch, seqlen), shifted here; -100 does not count. A token is never predicted
                from padding.
            interpolate_pos_encoding: take images of another size than the config's.
            num_items_in_batch: divides the summed loss instead of the number of labels.
            logits_to_keep: compute logits of the last so many columns only; 0 for all.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        inputs = Blip2Inputs(
            input_ids, attention_mask, inputs_embeds, pixel_values, interpolate_pos_encoding
        )
        return self.run(inputs, labels, num_items_in_batch, logits_to_keep)

    def embed(self, inputs: Blip2Inputs) -> Embedded:
        return embedded(self.embed_prompt(inputs), inputs.attention_mask, None)

    def before_answer(self, inputs: Mapping[str, Any], batch: int) -> Tensor:
        if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
            return self.start_ids(batch)
        return super().before_answer(inputs, batch)


class Blip2T5(Generative, Generates[T5State]):
    """BLIP-2 on FlanT5: its encoder reads image and prompt, its decoder answers."""

    inputs_class = Blip2Inputs
    config: Blip2Config

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        text = config.text
        if not isinstance(text, T5Config):
            raise ValueError(f"text_config: expected a T5's, got {type(text).__name__}")
        self.generation_config = {}
        self.add_sides(config, T5Language(text), text.d_model)
        self.language_model.reset_parameters()

    @property
    def words(self) -> T5Language:
        language: T5Language = self.language_model
        return language

    def tied_names(self) -> Mapping[str, str]:
        names = t5_tied_names(self.words.config)
        return {f"language_model.{a}": f"language_model.{b}" for a, b in names.items()}

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> VLMOutput:
        """Logits of every token of the answer and, with labels, the loss.

        Args:
            pixel_values, input_ids, inputs_embeds, interpolate_pos_encoding: the prompt, as of
                `Blip2OPT.forward`.
            attention_mask: (batch, seqlen), 0 on padding, at the ends of a row.
            decoder_input_ids, decoder_attention_mask, labels, num_items_in_batch: the answer, as
                of `T5Language.forward`; labels alone are enough, and are not shifted.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        prompt = Blip2Inputs(
            input_ids, attention_mask, inputs_embeds, pixel_values, interpolate_pos_encoding
        )
        memory = self._encode(prompt)
        output: VLMOutput = self.language_model(
            memory, decoder_input_ids, decoder_attention_mask, labels, num_items_in_batch
        )
        return output

    def _encode(self, prompt: Blip2Inputs) -> Memory:
        return self.words.encode(self.embed_prompt(prompt), prompt.attention_mask)

    @torch.inference_mode()
    def prefill(self, max_new_tokens: int, **inputs: Any) -> tuple[Tensor, T5State]:
        """See `vlmkernels.models.generation.Generates`; `inputs` as of `forward`."""
        return self.words.start(self._encode(Blip2Inputs(**inputs)), max_new_tokens)

    def decode(self, tokens: Tensor, state: T5State) -> Tensor:
        """See `vlmkernels.models.generation.Generates`."""
        return self.words.step(tokens, state)

    def before_answer(self, inputs: Mapping[str, Any], batch: int) -> Tensor:
        return self.words.start_tokens(batch, self.device)[:, None]


class Blip2:
    """`from_pretrained` gives the model that a directory holds, `new` the one of a config."""

    @staticmethod
    def model_class(config: Blip2Config) -> type[Blip2Base]:
        if config.architecture == GENERATION:
            return Blip2T5 if isinstance(config.text, T5Config) else Blip2OPT
        return Blip2Retrieval if config.architecture == RETRIEVAL else Blip2Pretraining

    @classmethod
    def new(cls, config: Blip2Config) -> Any:
        """With random weights."""
        return cls.model_class(config)(config)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Any:
        """In eval mode; see `vlmkernels.models.load`."""
        return cls.class_of(path).from_pretrained(path, **options)

    @classmethod
    def class_of(cls, path: str | Path) -> type[Blip2Base]:
        return cls.model_class(read_config(Path(path)))
