"""Codebook: codes that follow the tokens they stand for, by exponential moving averages."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from vlmkernels import ops
from vlmkernels.ops.vq_lookup import VQLookup, sum_by_code


class Codebook(torch.nn.Module):
    """count_k <- decay count_k + (1 - decay) n_k, sum_k likewise; code_k = sum_k / count_k

    n_k: the tokens whose nearest code is k. Counts are smoothed: (count + eps) / (total + K eps) *
    total. Codes of fewer than `threshold_ema_dead_code` tokens are replaced by tokens of the batch.
    A token that `ops.vq_lookup` gives the distance NaN has no code: it moves none and becomes none.
    With `sync`, counts and sums are those of all ranks of `process_group`, and so are the
    replacements: every rank ends with the same codes. Nothing waits for the GPU.

    Buffers, their names and shapes (num_codebooks, codebook_size, ...) are those of
    vector-quantize-pytorch. Source: van den Oord et al. 2017, appendix A.1.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        ema_update: bool = True,
        learnable_codebook: bool = False,
        sync: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= decay <= 1 or not eps >= 0:
            raise ValueError(
                "VectorQuantize: decay must be in [0, 1] and eps not negative, got "
                f"{decay} and {eps}"
            )
        self.codebook_size, self.decay, self.eps = codebook_size, decay, eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.kmeans_iters, self.ema_update = kmeans_iters, ema_update
        self.metric = "cosine" if use_cosine_sim else "euclidean"
        self.sync, self.process_group = sync, process_group
        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            torch.nn.init.kaiming_uniform_(embed)
            embed = self._unit(embed)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = torch.nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self._needs_init = kmeans_init  # spares reading `initted` at each call

    def _unit(self, x: Tensor) -> Tensor:
        return normalize(x, dim=-1, eps=1e-6) if self.metric == "cosine" else x

    def forward(self, x: Tensor, mask: Tensor | None = None, update: bool = True) -> list[VQLookup]:
        """x: (num_codebooks, num_tokens, dim) in fp32; mask (num_tokens,): tokens that count.

        Returns one look-up for each codebook. Codes move afterwards, in training.
        """
        seen = x.detach() if mask is None else x.detach()[:, mask]
        if self._needs_init:
            self._needs_init = not self.initted and not self._kmeans(seen)
        found = [
            ops.vq_lookup(tokens, codes, metric=self.metric)
            for tokens, codes in zip(x, self.embed.float(), strict=True)
        ]
        if update and self.training and (self.ema_update or self.threshold_ema_dead_code > 0):
            indices = torch.stack([self._codes_of(f) for f in found])
            self._update(seen, indices if mask is None else indices[:, mask])
        return found

    def _codes_of(self, found: VQLookup) -> Tensor:
        """(num_tokens,) indices, codebook_size of the tokens that have no code."""
        return found.indices.masked_fill(found.distance.isnan(), self.codebook_size)

    @torch.no_grad()
    def _update(self, x: Tensor, indices: Tensor) -> None:
        counts, sums = self._totals(x, indices)
        self.cluster_size.lerp_(counts.to(self.cluster_size), 1 - self.decay)
        self.embed_avg.lerp_(sums.to(self.embed_avg), 1 - self.decay)
        if self.ema_update:
            self._follow()
        if self.threshold_ema_dead_code > 0:
            dead = self.cluster_size < self.threshold_ema_dead_code
            self._replace(x, indices < self.codebook_size, dead)

    def _totals(self, x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens each code has, and their sum, over all ranks: a sum by segments, the last
        of which, of the tokens without a code, is left out."""
        size = self.codebook_size
        counts = torch.stack(  # integers, whose sum has no order
            [i.new_zeros(size + 1).scatter_add_(0, i, torch.ones_like(i))[:size] for i in indices]
        )
        heads = zip(x, indices, strict=True)
        sums = torch.stack([sum_by_code(rows, codes, size + 1)[:size] for rows, codes in heads])
        return self._all_reduce(counts).to(x), self._all_reduce(sums)

    def _all_reduce(self, x: Tensor) -> Tensor:
        if self.sync:
            dist.all_reduce(x, group=self.process_group)
        return x

    def _follow(self) -> None:
        total = self.cluster_size.sum(-1, keepdim=True)
        size = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        self.embed.copy_(self._unit(self.embed_avg / size[..., None]))

    def _replace(self, x: Tensor, valid: Tensor, dead: Tensor) -> None:
        """Dead codes become valid tokens of the batch, each token at most once; the others wait."""
        size = max(float(self.threshold_ema_dead_code), 1e-12)
        for head in range(x.shape[0]):
            tokens, replaced = self._sample(x[head], valid[head], dead[head])
            column = replaced[:, None]
            self.embed[head] = torch.where(column, tokens.to(self.embed), self.embed[head])
            self.cluster_size[head].masked_fill_(replaced, size)
            self.embed_avg[head] = torch.where(
                column, (tokens * size).to(self.embed_avg), self.embed_avg[head]
            )

    def _sample(self, x: Tensor, valid: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """A valid token of x, or of another rank's, for each code that is wanted; and which got
        one."""
        ranks = dist.get_world_size(self.process_group) if self.sync else 1
        rank = dist.get_rank(self.process_group) if self.sync else 0
        place = wanted.cumsum(0) - 1
        mine = wanted & (place % ranks == rank) & (place // ranks < valid.sum())
        tokens = x.new_zeros(wanted.shape[0], x.shape[1])
        if x.shape[0]:
            order = torch.randperm(x.shape[0], device=x.device)
            order = order[valid[order].byte().argsort(descending=True, stable=True)]
            chosen = x[order[(place // ranks).clamp(0, x.shape[0] - 1)]]
            tokens = torch.where(mine[:, None], chosen, tokens)
        return self._all_reduce(tokens), self._all_reduce(mine.to(x.dtype)) > 0

    @torch.no_grad()
    def _kmeans(self, x: Tensor) -> bool:
        """Lloyd's iterations from tokens of the batch, duplicates of them where they are fewer than
        codes; False where there is none. A code that no token chose keeps its place with a count of
        1, as codes start without k-means: from a count of 0 it would become 0."""
        everything = torch.ones(self.codebook_size, dtype=torch.bool, device=x.device)
        # As `ops.vq_lookup` takes them; in all heads, so that the same codes get a token in each.
        valid = (x.abs() < 2.0**50).all(dim=(0, 2))
        samples = [self._sample(tokens, valid, everything) for tokens in x]
        drawn = samples[0][1].nonzero()[:, 0]  # the same codes of all heads
        if not len(drawn):
            return False
        code = torch.arange(self.codebook_size, device=x.device)
        source = torch.where(samples[0][1], code, drawn[code % len(drawn)])
        means = torch.stack([tokens[source] for tokens, _ in samples])
        counts = torch.zeros_like(self.cluster_size)
        for _ in range(self.kmeans_iters):
            indices = torch.stack(
                [
                    self._codes_of(ops.vq_lookup(tokens, codes, metric=self.metric))
                    for tokens, codes in zip(x, means, strict=True)
                ]
            )
            counts, sums = self._totals(x, indices)
            moved = self._unit(sums / counts.clamp(min=1)[..., None])
            means = torch.where(counts[..., None] == 0, means, moved)
        counts.clamp_(min=1)
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(means * counts[..., None])
        self._follow()
        self.initted.fill_(True)
        return True
