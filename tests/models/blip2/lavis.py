"""The Q-Former and LAVIS' first-stage losses in plain PyTorch: dense masks, padded grids, caches.

A transcription of the formulas (arXiv 2301.12597, section 3.1; LAVIS' Blip2Qformer.forward) over
the parameters of a model of this package, for its tests to agree with.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmkernels.models.blip2 import Blip2Config

Cache = list[tuple[Tensor, Tensor]]


class Lavis:
    def __init__(self, config: Blip2Config, parameters: dict[str, Tensor]) -> None:
        self.config, self.p = config, parameters

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.qformer.layer_norm_eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """q (batch, seqlen_q, dim); seen bool (batch, seqlen_q, seqlen_k)."""
        heads = self.config.qformer.num_attention_heads
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], -10000.0)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def mlp(self, inner: str, outer: str, x: Tensor) -> Tensor:
        y = self.linear(f"{outer}.dense", F.gelu(self.linear(f"{inner}.dense", x)))
        return self.norm(f"{outer}.LayerNorm", y + x)

    def bert(
        self, x: Tensor, num_queries: int, image: Tensor | None, seen: Tensor, past: Cache | None
    ) -> tuple[Tensor, Cache]:
        """x (batch, seqlen, dim): queries, then words; `past` goes before them as keys, values."""
        x, cache = self.norm("qformer.layernorm", x), []
        for i in range(self.config.qformer.num_hidden_layers):
            layer = f"qformer.encoder.layer.{i}."
            of = f"{layer}attention.attention."
            q, k, v = (self.linear(of + name, x) for name in ("query", "key", "value"))
            if past is not None:
                k, v = torch.cat([past[i][0], k], 1), torch.cat([past[i][1], v], 1)
            cache.append((k, v))
            y = self.linear(f"{layer}attention.output.dense", self.attend(q, k, v, seen))
            x = self.norm(f"{layer}attention.output.LayerNorm", y + x)
            parts = []
            if num_queries:
                queries = x[:, :num_queries]
                if i % self.config.qformer.cross_attention_frequency == 0:
                    of = f"{layer}crossattention."
                    q = self.linear(f"{of}attention.query", queries)
                    k, v = (self.linear(f"{of}attention.{n}", image) for n in ("key", "value"))
                    y = self.linear(f"{of}output.dense", self.attend(q, k, v, None))
                    queries = self.norm(f"{of}output.LayerNorm", y + queries)
                parts = [self.mlp(f"{layer}intermediate_query", f"{layer}output_query", queries)]
            if x.shape[1] > num_queries:
                words = x[:, num_queries:]
                parts.append(self.mlp(f"{layer}intermediate", f"{layer}output", words))
            x = torch.cat(parts, dim=1)
        return x, cache

    def embed(self, ids: Tensor) -> Tensor:
        positions = self.p["embeddings.position_embeddings.weight"][: ids.shape[1]]
        return self.p["embeddings.word_embeddings.weight"][ids] + positions

    def queries(self, batch: int) -> Tensor:
        return self.p["query_tokens"].expand(batch, -1, -1)

    def losses(
        self, image: Tensor, ids: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ITC, ITM and ITG of the tower's features (batch, num_tokens, width); padding right."""
        batch, count = len(ids), self.config.num_query_tokens
        words, ones = mask.bool(), torch.ones(batch, count, dtype=torch.bool)
        # Pass A: queries; pass B: text.
        queries, cache = self.bert(
            self.queries(batch), count, image, ones[:, None].expand(-1, count, -1), None
        )
        text, _ = self.bert(
            self.embed(ids), 0, None, words[:, None].expand(-1, ids.shape[1], -1), None
        )
        image_feats = F.normalize(self.linear("vision_projection", queries), dim=-1)
        text_feats = F.normalize(self.linear("text_projection", text[:, 0]), dim=-1)
        products = torch.einsum("iqd,td->itq", image_feats, text_feats)
        i2t = products.max(-1).values / self.p["temp"]
        t2i = i2t.T
        own = torch.arange(batch)
        itc = sum(F.cross_entropy(s, own, label_smoothing=0.1) for s in (i2t, t2i)) / 2
        # Hard negatives, then three passes' worth of pairs.
        with torch.no_grad():
            weights = [s.clone().fill_diagonal_(-10000).softmax(1).float() for s in (t2i, i2t)]
            wrong_image, wrong_text = (
                torch.multinomial(w, 1, generator=generator)[:, 0] for w in weights
            )
        all_ids, all_words = (torch.cat([x, x, x[wrong_text]]) for x in (ids, words))
        seen = torch.cat([ones.repeat(3, 1), all_words], dim=1)[:, None]
        x = torch.cat([self.queries(3 * batch), self.embed(all_ids)], dim=1)
        matched, _ = self.bert(
            x,
            count,
            torch.cat([image, image[wrong_image], image]),
            seen.expand(-1, x.shape[1], -1),
            None,
        )
        logits = self.linear("itm_head", matched[:, :count]).mean(dim=1)
        itm = F.cross_entropy(logits, (torch.arange(3 * batch) < batch).long())
        # Captions, with the keys and values of pass A in front.
        captions = ids.clone()
        captions[:, 0] = self.config.caption_token_id
        seen = torch.cat([ones, words], dim=1)[:, None].expand(-1, ids.shape[1], -1).clone()
        seen[:, :, count:] &= torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        h, _ = self.bert(self.embed(captions), 0, None, seen, cache)
        of = "cls.predictions."
        h = self.norm(f"{of}transform.LayerNorm", F.gelu(self.linear(f"{of}transform.dense", h)))
        logits = h @ self.p["embeddings.word_embeddings.weight"].T + self.p[f"{of}bias"]
        labels = captions.masked_fill(~words, -100)
        itg = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
        )
        return itc, itm, itg
