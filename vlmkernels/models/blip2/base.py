"""What all BLIP-2 models share: the image tower, the learned queries and the Q-Former."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from vlmkernels.models.checkpoint import CONFIG, read_json
from vlmkernels.models.pretrained import Pretrained

from .config import Blip2Config
from .qformer import QFormer, apart
from .vision import Blip2Vision
from .weights import own_name


class Blip2Base(Pretrained):
    """BLIP-2 (arXiv 2301.12597) with the published parameter names and transformers' keywords."""

    config_class = Blip2Config
    config: Blip2Config
    architecture: ClassVar[str]

    @classmethod
    def read_config(cls, path: Path) -> Blip2Config:
        # Of whatever stage the file is: this class is what was asked for.
        return Blip2Config.from_dict(
            read_json(path / CONFIG) | {"architectures": [cls.architecture]}
        )

    def add_image_side(self, config: Blip2Config) -> None:
        self.config = dataclasses.replace(config, architecture=self.architecture)
        self.vision_model = Blip2Vision(config.vision)
        width = config.qformer.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.qformer = QFormer(config.qformer)

    def queries(self, batch: int) -> Tensor:
        """(batch, num_query_tokens, hidden_size)"""
        return self.query_tokens.expand(batch, -1, -1)

    def image_queries(self, image: Tensor) -> Tensor:
        """Features of the tower (batch, num_tokens, width) -> what the queries read out of them,
        (batch, num_query_tokens, hidden_size)."""
        batch, count = len(image), self.config.num_query_tokens
        layout = apart(batch, count, None, image.device)
        queries: Tensor = self.qformer(self.queries(batch), image, None, layout)[0]
        return queries

    def take(self, other: Blip2Base) -> Self:
        """This model with every parameter that `other`, of another stage, has under the same name.

        So the Q-Former goes from pretraining to retrieval, or to a language model.
        """
        state = other.state_dict()
        self.load_state_dict(
            {k: v for k, v in state.items() if k in self.state_dict()}, strict=False
        )
        return self

    def own_name(self, stored: str) -> str:
        return own_name(stored)
