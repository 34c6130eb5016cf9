"""Beam search: the num_beams most likely answers so far go on together, in step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from vlmkernels.models.fields import COUNT, FLAG_OR_NEVER, NUMBER, expect
from vlmkernels.models.rules import Rules

NEVER = -1e9  # the score of what must not be chosen


@dataclass(frozen=True)
class Beams:
    """How wide the search is, and what is returned.

    An answer's score is the sum of its log probabilities / (number of its tokens)^length_penalty:
    above 0 longer answers are favoured, below 0 shorter ones.
    early_stopping: True ends a prompt's search as soon as it has num_beams ended answers; False
    when no running one, as long as it is now, could take the place of an ended one; "never" also
    counts on it growing longer, if length_penalty > 0.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        expect("num_beams", self.num_beams, COUNT)
        expect("length_penalty", self.length_penalty, NUMBER)
        expect("early_stopping", self.early_stopping, FLAG_OR_NEVER)
        expect("num_return_sequences", self.num_return_sequences, COUNT)
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences: expected from 1 to num_beams {self.num_beams}, "
                f"got {self.num_return_sequences}"
            )
        if self.num_beams == 1 and (self.length_penalty != 1 or self.early_stopping):
            raise ValueError("length_penalty, early_stopping: expected together with num_beams > 1")


class Rows(Protocol):
    """What a model carries from step to step, a row for every answer."""

    def select(self, rows: Tensor) -> None:
        """Row i goes on from what row rows[i] holds, which is of the same prompt."""


State = TypeVar("State", bound=Rows)


@dataclass
class Answers:
    """Answers to each prompt, so far."""

    tokens: Tensor  # (batch, count, max_new_tokens)
    scores: Tensor  # (batch, count)
    ended: Tensor  # (batch, count)
    lengths: Tensor  # (batch, count)

    @classmethod
    def none(cls, batch: int, count: int, rules: Rules, device: torch.device) -> Answers:
        return cls(
            torch.full((batch, count, rules.max_new_tokens), rules.pad_id, device=device),
            torch.full((batch, count), NEVER, device=device),
            torch.zeros(batch, count, dtype=torch.bool, device=device),
            torch.zeros(batch, count, dtype=torch.int64, device=device),
        )

    def take(self, places: Tensor) -> Answers:
        """(batch, count) places -> those candidates"""
        tokens = self.tokens.gather(1, places[..., None].expand(-1, -1, self.tokens.shape[-1]))
        rest = (x.gather(1, places) for x in (self.scores, self.ended, self.lengths))
        return Answers(tokens, *rest)

    def best_with(self, other: Answers) -> Answers:
        """The best of both, as many as here."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        both = Answers(*(torch.cat(pair, dim=1) for pair in pairs))
        return both.take(both.scores.topk(self.scores.shape[1]).indices)


@torch.inference_mode()
def beam_search(
    logits: Tensor,
    state: State,
    decode: Callable[[Tensor, State], Tensor],
    beams: Beams,
    rules: Rules,
    seen: Tensor | None = None,
) -> Tensor:
    """The best answers, (batch * num_return_sequences, num_new), those of a prompt together and
    the best first. Token for token what transformers gives.

    Args:
        logits: (batch, vocab_size) of the token after each prompt; state: of the model there.
        decode: one more token (batch * num_beams,) of every row -> logits of the next.
        seen: (batch, vocab_size), see `Rules`.
    """
    batch, width, device = len(logits), beams.num_beams, logits.device
    # One more candidate per beam for each way to end: so width of them always go on.
    num_kept = max(2, 1 + len(rules.eos)) * width
    first_row = torch.arange(batch, device=device)[:, None] * width
    rows = torch.arange(batch, device=device).repeat_interleave(width)
    state.select(rows)
    logits, seen = logits[rows], None if seen is None else seen[rows]
    running, ended = (Answers.none(batch, width, rules, device) for _ in range(2))
    running.scores[:, 0] = 0.0  # the others start alike: not to be chosen
    improvable = torch.ones(batch, 1, dtype=torch.bool, device=device)
    for step in range(rules.max_new_tokens):
        kept, parents = _continuations(logits, running, rules, seen, step, num_kept)
        ends = kept.ended if step + 1 < rules.max_new_tokens else torch.ones_like(kept.ended)
        going = (kept.scores + ends * NEVER).topk(width)
        running = kept.take(going.indices)
        running.scores = going.values
        ended = ended.best_with(_ended(kept, ends, ended, improvable, beams, step + 1))
        improvable = improvable & _may_improve(running, ended, beams, rules, step + 1)
        full = ended.ended.all() & (beams.early_stopping is True)
        if bool(full | ends.all() | ~improvable.any()):
            break
        rows = (parents.gather(1, going.indices) + first_row).flatten()
        tokens = running.tokens[:, :, step].flatten()
        state.select(rows)
        if seen is not None:
            seen = seen[rows].scatter(1, tokens[:, None], True)
        logits = decode(tokens, state)
    best = slice(beams.num_return_sequences)
    return ended.tokens[:, best, : int(ended.lengths[:, best].max())].flatten(0, 1)


def _continuations(
    logits: Tensor, running: Answers, rules: Rules, seen: Tensor | None, step: int, count: int
) -> tuple[Answers, Tensor]:
    """The `count` most likely answers that are one token longer, and whose continuation each is."""
    log_probs = rules.apply(logits.float().log_softmax(-1), seen, step)
    batch, width = running.scores.shape
    scores = log_probs.view(batch, width, -1) + running.scores[:, :, None]
    top = scores.flatten(1).topk(count)
    parents = top.indices // logits.shape[-1]
    tokens = top.indices % logits.shape[-1]
    kept = running.take(parents)
    kept.tokens[:, :, step] = tokens
    ends = rules.ends(kept.tokens[:, :, : step + 1].flatten(0, 1)).view_as(tokens)
    return Answers(kept.tokens, top.values, ends, kept.lengths + 1), parents


def _ended(
    kept: Answers, ends: Tensor, ended: Answers, improvable: Tensor, beams: Beams, length: int
) -> Answers:
    """Of the candidates, best first, those that end and are among the first num_beams."""
    first = torch.arange(kept.scores.shape[1], device=ends.device) < beams.num_beams
    new = ends & first
    full = ended.ended.all(dim=1, keepdim=True) & (beams.early_stopping is True)
    scores = kept.scores / length**beams.length_penalty
    scores = scores + full * NEVER + ~improvable * NEVER + ~new * NEVER
    return Answers(kept.tokens, scores, new, kept.lengths)


def _may_improve(
    running: Answers, ended: Answers, beams: Beams, rules: Rules, length: int
) -> Tensor:
    """(batch, 1): whether the best running answer could still beat the worst ended one."""
    if beams.early_stopping == "never" and beams.length_penalty > 0:
        length = rules.max_new_tokens
    best = running.scores[:, :1] / length**beams.length_penalty
    worst = ended.scores.min(dim=1, keepdim=True).values
    better: Tensor = best > torch.where(ended.ended, worst, NEVER)
    return better.any(dim=1, keepdim=True)
