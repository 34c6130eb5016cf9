"""BLIP-2's first stage in training: contrast, matching and captioning in two Q-Former passes.

As LAVIS' Blip2Qformer computes them (arXiv 2301.12597, section 3.1), on one process' batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from vlmkernels.models.checkpoint import read_tensors
from vlmkernels.models.layers import activation
from vlmkernels.models.output import Output
from vlmkernels.nn import LayerNorm

from .config import PRETRAINING, Blip2Config, Blip2QFormerConfig
from .qformer import joint
from .retrieval import FirstStage, Texts, nearest, unit
from .weights import names_of_bert

SMOOTHING = 0.1  # of the labels, in contrast and captioning
TEMPERATURE = 0.07  # where it starts


@dataclass
class PretrainingOutput(Output):
    """loss = loss_itc + loss_itm + loss_itg, each a mean."""

    loss: Tensor
    loss_itc: Tensor
    loss_itm: Tensor
    loss_itg: Tensor


class Transform(nn.Module):
    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.act = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.LayerNorm(self.act(self.dense(x)))
        return y


class Predictions(nn.Module):
    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = Transform(config)


class WordHead(nn.Module):
    """BERT's: logits = layer_norm(gelu(W h + b)) E^T + bias, E the word embeddings."""

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)

    def forward(self, h: Tensor, word_embeddings: Tensor) -> Tensor:
        h = self.predictions.transform(h)
        return nn.functional.linear(h, word_embeddings, self.predictions.bias)


class Blip2Pretraining(FirstStage):
    """The first stage with a temperature and a head for words, under LAVIS' names for them."""

    architecture = PRETRAINING

    def __init__(self, config: Blip2Config) -> None:
        super().__init__(config)
        if config.caption_token_id >= config.qformer.vocab_size:
            raise ValueError(
                f"caption_token_id: expected below qformer_config.vocab_size = "
                f"{config.qformer.vocab_size}, got {config.caption_token_id}"
            )
        self.temp = nn.Parameter(torch.tensor(TEMPERATURE))
        self.cls = WordHead(config.qformer)
        self.reset_parameters()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> PretrainingOutput:
        """The losses of pairs of an image and its text.

        Args:
            pixel_values, input_ids, attention_mask: as of `Blip2Retrieval.forward`, at least two
                pairs. Where a text is to be generated its first token, [CLS], becomes [DEC].
            generator: draws the hard negatives: an image for each text, then a text for each image.

        Raises:
            ValueError: naming the argument, what was expected and what came.
        """
        input_ids, mask = self.checked(input_ids, attention_mask)
        # Queries never see the words that follow them, so one pass serves contrast and captioning:
        # each text is there behind the queries of its image, and once more alone.
        twice = None if mask is None else mask.repeat(2, 1)
        texts = self.pack(input_ids.repeat(2, 1), twice)
        image = self.vision_model(pixel_values, interpolate_pos_encoding)
        batch = len(image)
        if len(input_ids) != batch or batch < 2:
            raise ValueError(
                f"pixel_values: expected at least two images, one for each text, got {batch} and "
                f"{len(input_ids)} texts"
            )
        texts.ids[texts.first[:batch]] = self.config.caption_token_id
        layout = joint(batch, self.config.num_query_tokens, texts.packing, causal=True)
        queries, words = self.qformer(self.queries(batch), image, self.embed(texts), layout)
        image_embeds = unit(self.vision_projection(queries))
        text_embeds = unit(self.text_projection(words[texts.first[batch:]]))
        similarity = nearest(image_embeds, text_embeds).float() / self.temp
        itc = contrast(similarity)
        itm = self._matching_loss(image, input_ids, mask, similarity.detach(), generator)
        itg = self._caption_loss(words, texts)
        return PretrainingOutput(itc + itm + itg, itc, itm, itg)

    def _matching_loss(
        self,
        image: Tensor,
        input_ids: Tensor,
        mask: Tensor | None,
        similarity: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Every pair, every text with a wrong image, every image with a wrong text."""
        batch = len(image)
        wrong_image = hard_negatives(similarity.T, generator)
        wrong_text = hard_negatives(similarity, generator)
        right = torch.arange(batch, device=image.device)
        rows = torch.cat([right, right, wrong_text])
        texts = self.pack(input_ids[rows], None if mask is None else mask[rows])
        logits = self.match(image[torch.cat([right, wrong_image, right])], texts)
        labels = (torch.arange(3 * batch, device=image.device) < batch).long()
        return nn.functional.cross_entropy(logits.float(), labels)

    def _caption_loss(self, words: Tensor, texts: Texts) -> Tensor:
        """Of the first half of the texts: every word from those before it and the queries."""
        count = len(words) // 2
        targets = texts.ids[:count].roll(-1)
        ends = texts.first[1 : 1 + texts.packing.batch // 2] - 1
        targets[ends] = -100
        logits = self.cls(words[:count], self.embeddings.word_embeddings.weight)
        return nn.functional.cross_entropy(logits.float(), targets, label_smoothing=SMOOTHING)

    @torch.no_grad()
    def take_bert(self, path: str | Path) -> Self:
        """Start the Q-Former from a BERT in a checkpoint directory (bert-base-uncased), as LAVIS.

        Words and queries get its MLP; cross-attention, queries and projections stay as they are,
        and so do rows of the vocabulary that BERT does not have. Raises ValueError when a weight
        that BERT has to give is missing or of another shape; nothing is changed then.
        """
        own, given = dict(self.named_parameters()), {}
        for stored, tensor in read_tensors(Path(path)):
            for name in names_of_bert(stored):
                if name not in own:
                    continue
                given[name] = tensor
                if own[name][: len(tensor)].shape != tensor.shape:
                    raise ValueError(
                        f"{stored}: expected shape {(*own[name].shape,)}, got {(*tensor.shape,)}"
                    )
        wanted = {name for name in own if name.startswith(("qformer.", "embeddings.", "cls."))}
        missing = sorted(x for x in wanted - given.keys() if ".crossattention." not in x)
        if missing:
            raise ValueError(f"{path}: expected a BERT, it does not have {missing[:5]}")
        for name, tensor in given.items():
            own[name][: len(tensor)].copy_(tensor)
        return self

    def tied_names(self) -> Mapping[str, str]:
        # LAVIS' head has the embeddings once more.
        head = "cls.predictions."
        return {
            f"{head}decoder.weight": "embeddings.word_embeddings.weight",
            f"{head}decoder.bias": f"{head}bias",
        }

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.temp.fill_(TEMPERATURE)


def contrast(similarity: Tensor) -> Tensor:
    """(batch, batch) logits, pairs on the diagonal: mean cross entropy of rows and of columns."""
    targets = torch.arange(len(similarity), device=similarity.device)
    of_images, of_texts = (
        nn.functional.cross_entropy(logits, targets, label_smoothing=SMOOTHING)
        for logits in (similarity, similarity.T)
    )
    return (of_images + of_texts) / 2


def hard_negatives(similarity: Tensor, generator: torch.Generator | None) -> Tensor:
    """(batch, batch) logits -> (batch,): another index in each row, likelier where more similar."""
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    probability = similarity.masked_fill(own, -torch.inf).softmax(dim=1)
    return torch.multinomial(probability, 1, generator=generator)[:, 0]
