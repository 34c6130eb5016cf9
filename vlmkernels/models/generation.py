"""Text generation: prefill once, then one token of every row per step, until all rows end."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from vlmkernels.models.beam_search import Beams, State, beam_search
from vlmkernels.models.cache import KVCache
from vlmkernels.models.checkpoint import Json
from vlmkernels.models.fields import INDEX, INDICES, INTEGER, INTEGER_OR_NONE, REAL, expect
from vlmkernels.models.rules import Rules
from vlmkernels.models.stopping import StopStrings, expect_stop_strings
from vlmkernels.models.tokenizer import Tokenizer


@dataclass
class DecodeState:
    """What a decoder-only model carries from step to step."""

    cache: KVCache
    next_positions: Tensor  # (batch,) int64: position of the next token along every axis

    def select(self, rows: Tensor) -> None:
        """See `beam_search.Rows`."""
        self.cache.select(rows)
        self.next_positions = self.next_positions[rows]


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; else softmax(logits / temperature), cut to the top_k most likely
    tokens and to the smallest set that holds probability top_p. Neither has a meaning at 0."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        expect("temperature", self.temperature, REAL)
        expect("top_k", self.top_k, INTEGER_OR_NONE)
        expect("top_p", 1.0 if self.top_p is None else self.top_p, REAL)
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected in (0, 1], got {self.top_p}")
        self.expect_drawing(top_k=self.top_k, top_p=self.top_p)

    def expect_drawing(self, **options: Any) -> None:
        """ValueError when an option that only sampling heeds comes with greedy decoding."""
        given = [name for name, option in options.items() if option is not None]
        if self.temperature == 0 and given:
            raise ValueError(
                f"{given[0]}: expected together with temperature > 0, got temperature 0"
            )

    def logits(self, logits: Tensor) -> Tensor:
        """(batch, vocab_size) -> fp32 with -inf for every token that may not be drawn."""
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True)
            probability = ordered.softmax(-1)
            # A token stays while those before it hold less than top_p; so the first always stays.
            drop = probability.cumsum(-1) - probability >= self.top_p
            logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
        return logits

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """(batch, vocab_size) -> (batch,) token ids."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probability = self.logits(logits).softmax(dim=-1)
        return torch.multinomial(probability, 1, generator=generator)[:, 0]


class Generates(ABC, Generic[State]):
    """Gives a model `generate`, from two things that it can do: `prefill` and `decode`.

    State is what it carries from step to step.
    """

    inputs_class: ClassVar[type]  # dataclass of what a prompt is made of: keywords of `prefill`
    config: Any
    generation_config: Json  # the checkpoint's generation_config.json
    device: Any

    @abstractmethod
    def prefill(self, max_new_tokens: int, **inputs: Any) -> tuple[Tensor, State]:
        """Logits (batch, vocab_size) of the token after each prompt, and room for the answer."""

    @abstractmethod
    def decode(self, tokens: Tensor, state: State) -> Tensor:
        """One more token (batch,) of every row -> logits (batch, vocab_size) of the next."""

    def before_answer(self, inputs: Mapping[str, Any], batch: int) -> Tensor:
        """(batch, n) ids that `generate` returns in front of the new tokens: the prompt's."""
        ids: Tensor | None = inputs.get("input_ids")
        if ids is None:  # it came as inputs_embeds
            return torch.empty(batch, 0, dtype=torch.int64, device=self.device)
        return ids

    def generate(self, input_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Prompt and new tokens, (batch, seqlen + num_new), as transformers returns them.

        Args:
            input_ids, attention_mask, pixel_values, ...: the prompt as of `forward`, on any device:
                they are moved to the model's. Rows may be padded on either side; the new tokens are
                appended to the padded row.
            num_beams, length_penalty, early_stopping: beam search, see `Beams`; 1 for none.
            num_return_sequences: so many rows for each prompt, the best first; with beams.
            max_new_tokens: at most so many; fewer when every row has ended.
            max_length: the same counted with the padded prompt (with T5, with its start token).
                max_new_tokens goes before it. With neither: the checkpoint's, else 128 new ones.
            min_new_tokens, repetition_penalty: see `Rules`.
            temperature, top_k, top_p: see `Sampling`; greedy by default. Without beams.
            seed, generator: make sampling repeatable; at most one of them.
            eos_token_id: one or several; the checkpoint's by default. () for none.
            stop_strings: one or several; a row ends with the token that completes one of them, see
                `StopStrings`. They need `tokenizer`: ours or transformers'.
            pad_token_id: what a row gets after its end; the checkpoint's by default.

        Raises:
            ValueError: naming the argument; so too when top_k, top_p, seed or generator comes at
                temperature 0, where nothing is drawn, or an option of beams without them.
            TypeError: a keyword that neither `generate` nor the model's prompt knows; so too what
                `forward` takes of an answer, as labels and decoder_input_ids.
        """
        names = {field.name for field in dataclasses.fields(Beams)}
        beams = Beams(**{name: options.pop(name) for name in names & options.keys()})
        if beams.num_beams == 1:
            new = torch.stack(list(self.generate_steps(input_ids=input_ids, **options)), dim=1)
        else:
            expect_no_sampling(options)
            rules, logits, state, seen = self._begin(input_ids=input_ids, **options)
            new = beam_search(logits, state, self.decode, beams, rules, seen)
        count = beams.num_return_sequences
        before = self.before_answer({"input_ids": input_ids, **options}, len(new) // count)
        return torch.cat([before.to(new.device).repeat_interleave(count, dim=0), new], dim=1)

    def generate_steps(
        self,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        num_beams: int = 1,
        **options: Any,
    ) -> Iterator[Tensor]:
        """The new tokens as they are made, (batch,) for each step; arguments as of `generate`,
        without beams: their tokens are known at the end only."""
        if num_beams != 1:
            raise ValueError(f"num_beams: expected 1 to get tokens as they come, got {num_beams}")
        sampling = Sampling(temperature, top_k, top_p)
        sampling.expect_drawing(seed=seed, generator=generator)
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"generator: expected a torch.Generator, got {generator!r:.80}")
        if seed is not None and generator is not None:
            raise ValueError("seed: expected at most one of seed and generator, got both")
        if seed is not None:
            expect("seed", seed, INTEGER)
            generator = torch.Generator(self.device).manual_seed(seed)
        rules, logits, state, seen = self._begin(**options)
        ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        new = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
        for step in range(rules.max_new_tokens):
            scores = rules.apply(logits, seen, step)
            tokens = sampling.draw(scores, generator).masked_fill(ended, rules.pad_id)
            new = torch.cat([new, tokens[:, None]], dim=1)
            ended = ended | rules.ends(new)
            yield tokens
            if step + 1 == rules.max_new_tokens or bool(ended.all()):
                return
            if seen is not None:
                seen = seen.scatter(1, tokens[:, None], True)
            logits = self.decode(tokens, state)

    def _begin(
        self,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        min_new_tokens: int = 0,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        **inputs: Any,
    ) -> tuple[Rules, Tensor, State, Tensor | None]:
        """The rules, and what they and the model make of the prompt."""
        known = {field.name for field in dataclasses.fields(self.inputs_class)}
        if unknown := [name for name in inputs if name not in known]:
            raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")
        inputs = {k: x.to(self.device) if isinstance(x, Tensor) else x for k, x in inputs.items()}
        eos_ids = self._eos_token_ids(eos_token_id)
        pad_id = self._pad_token_id(pad_token_id, eos_ids)
        eos = torch.tensor(eos_ids, dtype=torch.int64, device=self.device)
        expect_stop_strings(stop_strings, tokenizer)
        if max_new_tokens is None and max_length is None:
            names = ("max_new_tokens", "max_length")
            max_new_tokens, max_length = map(self.generation_config.get, names)
        if max_new_tokens is None:
            max_new_tokens = 128 if max_length is None else self._room(max_length, inputs)
        rules = Rules(eos, pad_id, max_new_tokens, min_new_tokens, repetition_penalty)
        logits, state = self.prefill(max_new_tokens, **inputs)
        if max(eos_ids, default=0) >= (vocab_size := logits.shape[-1]):
            raise ValueError(
                f"eos_token_id: expected below vocab_size = {vocab_size}, got {max(eos_ids)}"
            )
        before = self.before_answer(inputs, len(logits))
        mask = inputs.get("attention_mask") if before is inputs.get("input_ids") else None
        if stop_strings is not None:
            stops = StopStrings(stop_strings, tokenizer, before, mask)
            rules = dataclasses.replace(rules, stops=stops)
        return rules, logits, state, rules.seen(before, mask, vocab_size)

    def _room(self, max_length: int, inputs: Mapping[str, Any]) -> int:
        """How many new tokens max_length leaves."""
        expect("max_length", max_length, INTEGER)
        prompts = (self.before_answer(inputs, 1), inputs.get("inputs_embeds"))
        known = (x.shape[1] for x in prompts if isinstance(x, Tensor) and x.ndim > 1)
        length = next(filter(None, known), 0)
        if max_length <= length:
            raise ValueError(
                f"max_length: expected more than the prompt's {length} tokens, got {max_length}"
            )
        return max_length - length

    def _eos_token_ids(self, given: int | Sequence[int] | None) -> list[int]:
        if given is None:
            given = self.generation_config.get("eos_token_id", self.config.eos_token_id)
        expect("eos_token_id", given, INDICES)
        if given is None:
            return []
        return [given] if isinstance(given, int) else list(given)

    def _pad_token_id(self, given: int | None, eos_ids: list[int]) -> int:
        if given is None:
            given = self.generation_config.get("pad_token_id", self.config.pad_token_id)
        if given is None:
            return eos_ids[0] if eos_ids else 0
        expect("pad_token_id", given, INDEX)
        return given


def expect_no_sampling(options: dict[str, Any]) -> None:
    """Takes them out of `options`; ValueError when there are any."""
    sampling = {"temperature": 0, "top_k": None, "top_p": None, "seed": None, "generator": None}
    for name, absent in sampling.items():
        if options.pop(name, absent) != absent:
            raise ValueError(f"{name}: expected none with num_beams > 1, got one")


def stream_text(tokenizer: Tokenizer, steps: Iterator[Tensor]) -> Iterator[str]:
    """The text of one row's `generate_steps`, piece by piece as it becomes certain."""
    stream = tokenizer.stream()
    for tokens in steps:
        if len(tokens) != 1:
            raise ValueError(f"stream_text: expected a batch of one, got {len(tokens)}")
        if piece := stream.push(int(tokens)):
            yield piece
    if piece := stream.finish():
        yield piece
