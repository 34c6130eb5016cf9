"""BLIP-2 on OPT and on FlanT5 against transformers, on checkpoints that transformers wrote."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.conftest import Backend
from tests.models.blip2.conftest import pixels
from tests.models.common import (
    assert_compiles_and_recomputes,
    assert_grads_match,
    picture,
    randomize,
    state_of,
)
from vlmkernels.models import load
from vlmkernels.models.blip2 import Blip2, Blip2OPT, Blip2Processor, Blip2T5
from vlmkernels.models.generation import stream_text

CAT, DOG = picture(40, 56), picture(64, 33, seed=1)
QUESTION = "Question: what is in the picture? Answer:"
Inputs = dict[str, Any]
Model = Blip2OPT | Blip2T5


def make(name: str, processor: Blip2Processor) -> Inputs:
    if name == "caption":
        return processor(images=[CAT])
    if name == "question":
        return processor(QUESTION, [CAT])
    side = name.removeprefix("padded ")
    return processor(["a dog", QUESTION, "two cars"], [CAT, DOG, DOG], padding_side=side)


CASES = ("question", "padded left", "padded right")


def with_labels(inputs: Inputs, model: Model) -> Inputs:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if isinstance(model, Blip2T5):
        labels = torch.randint(4, 160, (len(ids), 6), generator=torch.Generator().manual_seed(2))
        labels[:1, 4:] = -100
        return inputs | {"labels": labels}
    image = ids == model.image_token_id
    return inputs | {"labels": ids.masked_fill((mask == 0) | image, -100)}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_match_transformers(
    case: str, model: Model, hf_model: Any, processor: Blip2Processor
) -> None:
    inputs = with_labels(make(case, processor), model)
    model.zero_grad()
    hf_model.zero_grad()
    ours, theirs = model(**inputs), hf_model(**inputs)
    ours.loss.backward()
    theirs.loss.backward()
    real = torch.ones_like(inputs["labels"], dtype=torch.bool)
    if isinstance(model, Blip2OPT):
        real = inputs["attention_mask"] == 1
    assert theirs.logits[real].std() > 0.3
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=0, atol=1e-4)
    assert not ours.logits[~real].any()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    assert_grads_match(model, hf_model)


# transformers goes on behind padding on the right; that the side does not matter is tested below.
@pytest.mark.parametrize("case", ["caption", "question", "padded left"])
def test_greedy_tokens_match_transformers(
    case: str, model: Model, hf_model: Any, processor: Blip2Processor
) -> None:
    inputs = make(case, processor)
    options: Inputs = {"max_new_tokens": 6}
    expected = hf_model.generate(**inputs, do_sample=False, eos_token_id=None, **options)
    assert torch.equal(model.generate(**inputs, eos_token_id=(), **options), expected)


def test_beams_and_penalties_match_transformers(
    model: Model, hf_model: Any, processor: Blip2Processor
) -> None:
    inputs = make("padded left", processor)
    options: Inputs = {"num_beams": 3, "max_new_tokens": 6, "length_penalty": -1.0}
    expected = hf_model.generate(**inputs, do_sample=False, eos_token_id=7, **options)
    ours = model.generate(**inputs, eos_token_id=7, **options)
    assert torch.equal(ours, expected)
    caption = make("caption", processor)
    assert torch.equal(
        model.generate(**caption, eos_token_id=7, **options),
        hf_model.generate(**caption, do_sample=False, eos_token_id=7, **options),
    )


@pytest.mark.parametrize("case", CASES)
def test_cached_equals_uncached(case: str, model: Model, processor: Blip2Processor) -> None:
    inputs = make(case, processor)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits, state = model.prefill(5, **inputs)
    answer = torch.zeros(len(ids), 1, dtype=torch.int64)  # of T5, which starts with 0
    token = torch.full((len(ids),), 9)
    for _ in range(4):
        if isinstance(model, Blip2T5):
            uncached = model(**inputs, decoder_input_ids=answer).logits[:, -1]
        else:
            grown = inputs | {"input_ids": ids, "attention_mask": mask}
            last = torch.where(mask == 1, torch.arange(mask.shape[1]), 0).amax(dim=1)
            uncached = model(**grown).logits[torch.arange(len(ids)), last]
        torch.testing.assert_close(logits, uncached, rtol=0, atol=1e-4)
        logits = model.decode(token, state)
        answer, ids = (torch.cat([x, token[:, None]], dim=1) for x in (answer, ids))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


def test_a_row_does_not_depend_on_its_batch_or_padding_side(
    model: Model, processor: Blip2Processor
) -> None:
    options: Inputs = {"max_new_tokens": 6, "eos_token_id": ()}
    sides = [make(f"padded {side}", processor) for side in ("left", "right")]
    new = [model.generate(**x, **options)[:, -6:] for x in sides]
    assert torch.equal(*new)
    alone = processor("two cars", [DOG])
    assert torch.equal(model.generate(**alone, **options)[0, -6:], new[0][2])


def test_a_caption_is_the_answer_to_an_empty_prompt(
    model: Model, processor: Blip2Processor
) -> None:
    ids = model.start_ids(1)
    assert ids.tolist() == [[model.image_token_id] * 4 + [model.config.bos_token_id]]
    prompt = {"input_ids": ids, "pixel_values": processor(images=[CAT])["pixel_values"]}
    alone = model.generate(pixel_values=prompt["pixel_values"], max_new_tokens=5)
    assert torch.equal(model.generate(**prompt, max_new_tokens=5), alone)
    steps = model.generate_steps(**prompt, max_new_tokens=5, temperature=2.0, seed=0)
    new = model.generate(**prompt, max_new_tokens=5, temperature=2.0, seed=0)[0].tolist()
    before = 1 if isinstance(model, Blip2T5) else 5
    pieces = list(stream_text(processor.tokenizer, steps))
    assert "".join(pieces) == processor.tokenizer.decode(new[before:])
    if isinstance(model, Blip2OPT):  # ids that nobody gave do not come back
        embeds = torch.randn(2, 5, model.config.text.hidden_size)
        out = model.generate(inputs_embeds=embeds, max_new_tokens=3, eos_token_id=())
        assert out.shape == (2, 3)


def test_other_sizes_of_images(model: Model, hf_model: Any, processor: Blip2Processor) -> None:
    inputs = make("question", processor) | {"pixel_values": pixels(1, 48, 40)}
    if isinstance(model, Blip2T5):
        inputs["decoder_input_ids"] = torch.tensor([[0, 5, 6]])
    ours, theirs = (m(**inputs, interpolate_pos_encoding=True) for m in (model, hf_model))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)


def test_gradients_recomputed_and_compiled_are_the_same(
    checkpoint_dir: Path, processor: Blip2Processor
) -> None:
    model: Model = load(checkpoint_dir)
    inputs = with_labels(make("question", processor), model)
    del inputs["attention_mask"]
    assert_compiles_and_recomputes(model, lambda run: run(**inputs).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_backend_computes_the_same_model(
    backend: Backend, dtype: torch.dtype, model: Model, processor: Blip2Processor
) -> None:
    inputs = with_labels(make("question", processor), model)
    expected = model(**inputs).logits.detach()
    half = copy.deepcopy(model).to(backend.device, dtype)
    inputs = {name: x.to(backend.device) for name, x in inputs.items()}
    logits = half(**inputs).logits.detach().float().cpu()
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_round_trip_through_transformers(
    checkpoint_dir: Path, hf_model: Any, processor: Blip2Processor, tmp_path: Path
) -> None:
    load(checkpoint_dir).save_pretrained(tmp_path / "ours", max_shard_bytes=60_000)
    ours, theirs = state_of(tmp_path / "ours"), state_of(checkpoint_dir)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again, report = transformers.Blip2ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = with_labels(make("question", processor), load(checkpoint_dir))
    torch.testing.assert_close(again(**inputs).logits, hf_model(**inputs).logits)


def test_a_new_model_is_readable_by_transformers(
    checkpoint_dir: Path, processor: Blip2Processor, tmp_path: Path
) -> None:
    config = copy.deepcopy(load(checkpoint_dir).config)
    config.raw, config.text.raw = {}, {}
    model: Model = Blip2.new(config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    inputs = with_labels(make("question", processor), model)
    torch.testing.assert_close(model(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=1e-4)


def test_wrong_arguments_are_named(model: Model, processor: Blip2Processor) -> None:
    inputs = with_labels(make("question", processor), model)
    change: Inputs
    for change, message in (
        ({"pixel_values": None}, "pixel values: expected for 4 image tokens, got None"),
        ({"pixel_values": pixels(2)}, "input_ids: expected 8 image tokens .*, got 4"),
        ({"pixel_values": pixels(1, 40, 32)}, "expected images of 32 x 32, got 40 x 32"),
        ({"input_ids": inputs["input_ids"] + 160}, r"input_ids: expected in \[0, 160\)"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask: expected shape"),
        ({"labels": torch.zeros(2, 3, dtype=torch.int64)}, "expected"),
        ({"inputs_embeds": torch.zeros(1, 2, 64)}, "exactly one of input_ids and inputs_embeds"),
        (
            {"inputs_embeds": torch.zeros(1, 2, 64), "input_ids": None},
            "pixel_values: expected None with inputs_embeds",
        ),
        ({"input_ids": None, "pixel_values": None}, "exactly one of input_ids and inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs | change)


@pytest.mark.parametrize("option", ["labels", "decoder_input_ids", "decoder_attention_mask"])
def test_what_is_of_an_answer_is_no_argument_of_generate(
    option: str, model: Model, processor: Blip2Processor
) -> None:
    given = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match=rf"^generate\(\) got an unexpected .* '{option}'"):
        model.generate(**make("question", processor), **{option: given})
