"""BLIP-2 on OPT and on FlanT5 against transformers, on checkpoints that transformers wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.common import assert_grads_match, picture
from vlmkernels.models.blip2 import Blip2OPT, Blip2Processor, Blip2T5

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
