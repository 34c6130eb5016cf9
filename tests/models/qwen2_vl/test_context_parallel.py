"""A Qwen2-VL whose tokens are spread over ranks: loss, logits and gradients of one process."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.qwen2_vl.cases import make
from vlmkernels.distributed import context_parallel
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor
from vlmkernels.testing.ranks import run_ranks


def with_labels(name: str, processor: Qwen2VLProcessor) -> dict[str, Any]:
    inputs = make(name, processor)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("name", ["two_images", "padded_right"])
@pytest.mark.parametrize("items", [None, 13])
def test_training_step(
    name: str, items: int | None, model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    batch = {**with_labels(name, processor), "num_items_in_batch": items}
    alone = copy.deepcopy(model)
    expected = alone(**batch)
    expected.loss.backward()
    tokens = batch["attention_mask"].bool()

    def work(transport: Any) -> tuple[Tensor, int, list[Tensor]]:
        mine = copy.deepcopy(model)
        mine.gradient_checkpointing_enable()
        with context_parallel(transport, ulysses=False):
            out = mine(**batch)
        out.loss.backward()
        return out.loss.detach(), len(out.logits), [p.grad for p in mine.parameters()]

    ranks = run_ranks(3, work)
    assert sum(count for _, count, _ in ranks) == tokens.sum()
    for loss, _, _ in ranks:
        torch.testing.assert_close(loss, expected.loss.detach())
    averaged = [sum(grads) / 3 for grads in zip(*(g for _, _, g in ranks), strict=True)]
    for parameter, gradient in zip(alone.parameters(), averaged, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_logits(model: Qwen2VL, processor: Qwen2VLProcessor) -> None:
    batch = make("one_image", processor)
    with torch.no_grad():
        expected = model(**batch).logits[0]

    def work(transport: Any) -> Tensor:
        with torch.no_grad(), context_parallel(transport, layout="contiguous"):
            return model(**batch).logits

    torch.testing.assert_close(torch.cat(run_ranks(4, work)), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # outside of the context nothing has changed
        assert torch.equal(model(**batch).logits[0], expected)
