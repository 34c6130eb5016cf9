"""Generation: the same tokens as transformers, as without a cache, whatever the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.generation import logits_process as hf_logits

from tests.models.qwen2_vl import cases
from vlmkernels.models.generation import Sampling, stream_text
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor

NEW = 8


@pytest.mark.parametrize("search", [{}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize(
    "case", ["one_image", "two_images", "text", "padded_left", "image_and_video"]
)
def test_tokens_match_transformers(
    case: str,
    search: dict[str, int],
    model: Qwen2VL,
    hf_model: transformers.Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
) -> None:
    inputs = cases.make(case, processor)
    expected = hf_model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **search)
    assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, **search), expected)


def step_logits(model: Qwen2VL, inputs: dict[str, Any], steps: int) -> tuple[torch.Tensor, ...]:
    """Likely text tokens (batch, steps) and the logits (batch, steps, vocab_size) behind them."""
    logits, state = model.prefill(steps, **inputs)
    tokens, all_logits = [likely_text(model, logits)], [logits]
    for _ in range(steps - 1):
        all_logits.append(model.decode(tokens[-1], state))
        tokens.append(likely_text(model, all_logits[-1]))
    return torch.stack(tokens, 1), torch.stack(all_logits, 1)


def likely_text(model: Qwen2VL, logits: torch.Tensor) -> torch.Tensor:
    """A random model may well answer with a placeholder, which without its image is an error."""
    logits = logits.clone()
    logits[:, [model.config.image_token_id, model.config.video_token_id]] = -torch.inf
    return logits.argmax(-1)


@pytest.mark.parametrize("case", cases.CASES)
def test_cached_equals_uncached(case: str, model: Qwen2VL, processor: Qwen2VLProcessor) -> None:
    inputs = cases.make(case, processor)
    tokens, cached = step_logits(model, inputs, NEW)
    grown = dict(inputs)
    uncached = []
    for i in range(NEW):
        logits = model(**grown).logits
        last = [int(m.nonzero()[-1]) for m in grown["attention_mask"]]
        uncached.append(logits[torch.arange(len(last)), last].detach())
        for name, new in (("input_ids", tokens[:, i]), ("attention_mask", torch.ones(len(last)))):
            column = new.long()[:, None]
            grown[name] = torch.cat([grown[name], column], dim=1)
    torch.testing.assert_close(cached, torch.stack(uncached, 1), rtol=0, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch_or_padding_side(
    model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    left, right = (cases.make(f"padded_{side}", processor) for side in ("left", "right"))
    new = [model.generate(**x, max_new_tokens=NEW)[:, -NEW:] for x in (left, right)]
    assert torch.equal(*new)
    alone = processor("Describe the two videos")  # the second row of the case
    assert torch.equal(model.generate(**alone, max_new_tokens=NEW)[0, -NEW:], new[0][1])


@torch.inference_mode()
def test_places_beyond_the_cached_tokens_are_never_read(
    model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    inputs = cases.make("padded_left", processor)
    expected, _ = step_logits(model, inputs, 3)
    logits, state = model.prefill(3, **inputs)
    for layer in state.cache.layers:
        for row, seqlen in enumerate(state.cache.seqlens.tolist()):
            layer.keys[row, seqlen:] = torch.nan
            layer.values[row, seqlen:] = torch.nan
    tokens = [likely_text(model, logits)]
    for _ in range(2):
        tokens.append(likely_text(model, model.decode(tokens[-1], state)))
    assert torch.equal(torch.stack(tokens, 1), expected)


def test_rows_end_at_their_eos_and_the_batch_at_the_last(
    model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    inputs = cases.make("padded_left", processor)
    free = model.generate(**inputs, max_new_tokens=NEW, eos_token_id=())[:, -NEW:].tolist()
    # The second token of every row ends it, unless it came up before.
    eos = sorted({row[1] for row in free})
    out = model.generate(**inputs, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=5)
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [next(i for i, token in enumerate(row) if token in eos) for row in free]
    assert len(new[0]) == max(ends) + 1 < NEW
    for row, end, expected in zip(new, ends, free, strict=True):
        assert row == expected[: end + 1] + [5] * (max(ends) - end)


def test_sampling_is_repeatable_and_narrow_sampling_is_greedy(
    model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    inputs = cases.make("one_image", processor)
    options = {"max_new_tokens": 16, "temperature": 1.5, "eos_token_id": ()}
    first, again, other = (model.generate(**inputs, **options, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    greedy = model.generate(**inputs, max_new_tokens=16, eos_token_id=())
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(model.generate(**inputs, **options, **narrow, seed=3), greedy)


@pytest.mark.parametrize("top_k", [None, 7, 1000])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.95])
def test_top_k_and_top_p_keep_the_tokens_transformers_keeps(
    top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(4, 50) * 3
    expected = hf_logits.TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        expected = hf_logits.TopKLogitsWarper(top_k)(None, expected)
    if top_p:
        expected = hf_logits.TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(Sampling(0.7, top_k, top_p).logits(logits), expected)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20000, -1)
    draws = Sampling(1.0).draw(logits, torch.Generator().manual_seed(0))
    share = torch.bincount(draws, minlength=3) / 20000
    torch.testing.assert_close(share, logits[0].softmax(-1), rtol=0, atol=0.02)


def test_streamed_text_is_the_decoded_answer(model: Qwen2VL, processor: Qwen2VLProcessor) -> None:
    inputs = cases.make("two_images", processor)
    options = {"max_new_tokens": 40, "temperature": 3.0, "seed": 0, "eos_token_id": ()}
    pieces = list(stream_text(processor.tokenizer, model.generate_steps(**inputs, **options)))
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(pieces) > 3
    assert "".join(pieces).rstrip("\ufffd") == processor.tokenizer.decode(ids).rstrip("\ufffd")


def test_streaming_never_shows_half_a_character(processor: Qwen2VLProcessor) -> None:
    text = "½ 数字 é 😀 café"
    ids = processor.tokenizer.encode(text)
    stream = processor.tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces  # some token ended inside a character
    assert "".join(pieces) + stream.finish() == text
    cut = processor.tokenizer.stream()
    pieces = [cut.push(i) for i in processor.tokenizer.encode("a 😀")[:-1]]
    assert "".join(pieces) + cut.finish() == "a "


def test_generation_leaves_no_mode_behind(model: Qwen2VL, processor: Qwen2VLProcessor) -> None:
    steps = model.generate_steps(**cases.make("text", processor), max_new_tokens=4)
    next(steps)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: expected at least 0"),
        ({"temperature": float("nan")}, "temperature: expected at least 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: expected in"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: expected at least 1"),
        ({"top_k": 5}, "top_k: expected together with temperature > 0, got temperature 0"),
        ({"top_p": 0.9}, "top_p: expected together with temperature > 0, got temperature 0"),
        ({"seed": 0}, "seed: expected together with temperature > 0"),
        ({"generator": torch.Generator()}, "generator: expected together with temperature > 0"),
        ({"temperature": 1.0, "seed": 0, "generator": torch.Generator()}, "seed: expected at most"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected integers of at least 0, got '</s>'"),
        ({"pad_token_id": 0.5}, "pad_token_id: expected an integer of at least 0, got 0.5"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, Any], message: str, model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**cases.make("text", processor), **options)


def test_generation_wants_one_document_in_a_row(
    model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    inputs = cases.make("text", processor)
    position_ids = torch.zeros(4, *inputs["input_ids"].shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="position_ids: expected no documents"):
        model.generate(**inputs, position_ids=position_ids)


def test_a_row_of_padding_only_cannot_be_continued(model: Qwen2VL) -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="attention_mask: expected a token in every row"):
        model.generate(ids, attention_mask=mask)
