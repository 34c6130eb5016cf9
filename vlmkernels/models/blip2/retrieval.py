"""BLIP-2's first stage without its training: an image and a text, compared or matched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmkernels.models.packing import Packing, expect_grid, expect_no_empty_row, make_packing
from vlmkernels.models.vlm import expect_ids

from .base import Blip2Base
from .config import RETRIEVAL, Blip2Config
from .qformer import TextEmbeddings, apart, joint


@dataclass
class RetrievalOutput:
    """Contrast: (num_images, num_texts) cosines, of the query that is nearest to the text, and the
    unit embeddings they are made of. Matching: logits (batch, 2), no match and match."""

    logits_per_image: Tensor
    logits_per_text: Tensor
    image_embeds: Tensor | None = None  # (num_images, num_query_tokens, image_text_hidden_size)
    text_embeds: Tensor | None = None  # (num_texts, image_text_hidden_size)


@dataclass(frozen=True)
class Texts:
    """Texts without their padding: ids and positions (num_words,)."""

    ids: Tensor
    positions: Tensor
    packing: Packing

    @property
    def first(self) -> Tensor:
        """(num_texts,) the place of each text's first word in the run of words."""
        return self.packing.cu_seqlens[:-1].long()


class FirstStage(Blip2Base):
    """A Q-Former that reads texts as well, and its heads."""

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        if not config.qformer.use_qformer_text_input:
            raise ValueError("qformer_config.use_qformer_text_input: expected true, got false")
        self.add_image_side(config)
        width, dim = config.qformer.hidden_size, config.image_text_hidden_size
        self.embeddings = TextEmbeddings(config.qformer)
        self.vision_projection = nn.Linear(width, dim)
        self.text_projection = nn.Linear(width, dim)
        self.itm_head = nn.Linear(width, 2)

    def encode_image(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(num_images, num_query_tokens, image_text_hidden_size) of unit length."""
        image = self.vision_model(pixel_values, interpolate_pos_encoding)
        return unit(self.vision_projection(self.image_queries(image)))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(num_texts, image_text_hidden_size) of unit length."""
        texts = self.read(input_ids, attention_mask)
        layout = apart(0, 0, texts.packing, texts.ids.device)
        _, words = self.qformer(None, None, self.embed(texts), layout)
        return unit(self.text_projection(words[texts.first]))

    def match(self, image: Tensor, texts: Texts) -> Tensor:
        """Features of the tower (batch, num_tokens, width) and as many texts -> logits (batch, 2),
        the mean over the queries."""
        batch = texts.packing.batch
        if len(image) != batch:
            raise ValueError(
                f"input_ids: expected a text for each image, got {batch} texts and {len(image)} "
                "images"
            )
        layout = joint(batch, self.config.num_query_tokens, texts.packing, causal=False)
        queries, _ = self.qformer(self.queries(batch), image, self.embed(texts), layout)
        logits: Tensor = self.itm_head(queries).mean(dim=1)
        return logits

    def read(self, input_ids: Tensor, attention_mask: Tensor | None) -> Texts:
        """Checked, without placeholders and padding."""
        return self.pack(*self.checked(input_ids, attention_mask))

    def checked(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Both, checked and without placeholders."""
        qformer, count = self.config.qformer, self.config.num_query_tokens
        expect_grid("attention_mask", attention_mask, input_ids)
        if self.config.image_token_index is not None:
            input_ids = input_ids[:, count:]
            attention_mask = None if attention_mask is None else attention_mask[:, count:]
        expect_ids(input_ids, qformer.vocab_size)
        if (seqlen := input_ids.shape[1]) > qformer.max_position_embeddings:
            raise ValueError(
                f"input_ids: expected at most {qformer.max_position_embeddings} tokens, "
                f"got {seqlen}"
            )
        return input_ids, attention_mask

    def pack(self, input_ids: Tensor, attention_mask: Tensor | None) -> Texts:
        """What `checked` returns, or rows of it, without padding."""
        num_texts, seqlen = input_ids.shape
        packing = make_packing(num_texts, seqlen, input_ids.device, attention_mask)
        if attention_mask is None:
            positions = torch.arange(seqlen, device=input_ids.device).expand(num_texts, -1)
        else:
            expect_no_empty_row(packing)
            positions = (attention_mask != 0).cumsum(dim=1) - 1
        return Texts(packing.pack(input_ids), packing.pack(positions), packing)

    def embed(self, texts: Texts) -> Tensor:
        """(num_words, hidden_size)"""
        y: Tensor = self.embeddings(texts.ids, texts.positions)
        return y


class Blip2Retrieval(FirstStage):
    """`Blip2ForImageTextRetrieval` of transformers."""

    architecture = RETRIEVAL

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        self.reset_parameters()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_image_text_matching_head: bool = False,
        interpolate_pos_encoding: bool = False,
    ) -> RetrievalOutput:
        """Cosines of all images with all texts, or whether text i belongs to image i.

        Args:
            pixel_values: (num_images, 3, height, width).
            input_ids: (num_texts, seqlen) int64 of BERT's vocabulary. Where the config has an
                image_token_index, num_query_tokens of them stand in front of every text, as
                transformers' processor puts them, and are left out.
            attention_mask: (num_texts, seqlen), 0 on padding, on either side.
            use_image_text_matching_head: match pairs instead of comparing all with all.
            interpolate_pos_encoding: take images of another size than the config's.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        texts = self.read(input_ids, attention_mask)
        image = self.vision_model(pixel_values, interpolate_pos_encoding)
        if use_image_text_matching_head:
            logits = self.match(image, texts)
            return RetrievalOutput(logits, logits.T)
        batch, count = len(image), self.config.num_query_tokens
        layout = apart(batch, count, texts.packing, image.device)
        queries, words = self.qformer(self.queries(batch), image, self.embed(texts), layout)
        image_embeds = unit(self.vision_projection(queries))
        text_embeds = unit(self.text_projection(words[texts.first]))
        cosines = nearest(image_embeds, text_embeds)
        return RetrievalOutput(cosines, cosines.T, image_embeds, text_embeds)


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def nearest(image: Tensor, text: Tensor) -> Tensor:
    """image (num_images, num_queries, dim), text (num_texts, dim) -> (num_images, num_texts): the
    largest product of a text with one of an image's queries."""
    products: Tensor = image @ text.T
    return products.max(dim=1).values
