"""The whole model, forward and backward, through whichever kernels a machine has."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.conftest import Backend
from tests.models.qwen2_vl import cases
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor


def run(model: Qwen2VL, inputs: cases.Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(**inputs)
    assert out.loss is not None
    out.loss.backward()
    grads = {k: p.grad.float().cpu() for k, p in model.named_parameters() if p.grad is not None}
    return out.logits.float().cpu(), grads


@pytest.mark.parametrize("case", ["two_images", "padded_left"])
def test_every_backend_computes_the_same_model(
    case: str, backend: Backend, model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    inputs = cases.make(case, processor)
    inputs["labels"] = cases.labels_for(inputs)
    expected, expected_grads = run(model, inputs)
    half = copy.deepcopy(model).to(backend.device, torch.bfloat16)
    inputs = {name: tensor.to(backend.device) for name, tensor in inputs.items()}
    logits, grads = run(half, inputs)
    assert (logits - expected).norm() < 0.025 * expected.norm()
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).norm() < 0.05 * expected_grads[name].norm(), name
