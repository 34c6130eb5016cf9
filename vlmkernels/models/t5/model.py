"""T5 as a model of its own: google/flan-t5-xl and the like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmkernels.models.checkpoint import Json
from vlmkernels.models.generation import Generates
from vlmkernels.models.pretrained import PretrainedGenerator
from vlmkernels.models.vlm import VLMOutput, embed_text

from .config import T5Config
from .language import Memory, T5Language, T5State
from .weights import own_name, tied_names


@dataclass
class T5Inputs:
    """What a prompt is made of; the arguments of `T5.forward`, where they are described."""

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    inputs_embeds: Tensor | None = None


class T5(PretrainedGenerator, Generates[T5State]):
    """T5 with the published parameter names and transformers' keywords."""

    config_class = T5Config
    inputs_class = T5Inputs

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.generation_config: Json = {}
        self.language_model = T5Language(config)
        self.language_model.reset_parameters()

    def own_name(self, stored: str) -> str:
        name = own_name(stored)
        return name and f"language_model.{name}"

    def tied_names(self) -> Mapping[str, str]:
        names = tied_names(self.config)
        return {f"language_model.{a}": f"language_model.{b}" for a, b in names.items()}

    def published_state(self) -> Mapping[str, Tensor]:
        return self.language_model.state_dict()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **answer: Any,
    ) -> VLMOutput:
        """Logits of every decoder token and, with labels, the loss; `answer`, decoder_input_ids or
        labels, as of `T5Language.forward`.

        The encoder gets input_ids (batch, seqlen) or inputs_embeds (batch, seqlen, d_model), with 0
        in attention_mask on padding, on either side.
        """
        memory = self._encode(T5Inputs(input_ids, attention_mask, inputs_embeds))
        output: VLMOutput = self.language_model(memory, **answer)
        return output

    def _encode(self, prompt: T5Inputs) -> Memory:
        x = embed_text(prompt.input_ids, prompt.inputs_embeds, self.language_model)
        return self.language_model.encode(x, prompt.attention_mask)

    @torch.inference_mode()
    def prefill(self, max_new_tokens: int, **inputs: Any) -> tuple[Tensor, T5State]:
        """See `vlmkernels.models.generation.Generates`."""
        return self.language_model.start(self._encode(T5Inputs(**inputs)), max_new_tokens)

    def decode(self, tokens: Tensor, state: T5State) -> Tensor:
        """See `vlmkernels.models.generation.Generates`."""
        return self.language_model.step(tokens, state)

    def before_answer(self, inputs: Mapping[str, Any], batch: int) -> Tensor:
        return self.language_model.start_tokens(batch, self.device)[:, None]
