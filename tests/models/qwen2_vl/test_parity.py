"""Logits, loss and gradients against transformers, on a checkpoint that transformers wrote."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.models.qwen2_vl import cases
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor
from vlmkernels.models.qwen2_vl.weights import published_name

HfModel = transformers.Qwen2VLForConditionalGeneration


def assert_grads_match(model: torch.nn.Module, hf_model: HfModel, rtol: float = 1e-3) -> None:
    ours = dict(model.named_parameters())
    for name, expected in hf_model.named_parameters():
        grad = ours[published_name(name)].grad
        if expected.grad is None:  # a text-only batch does not touch the vision tower
            assert grad is None, name
            continue
        assert grad is not None, name
        assert float(expected.grad.norm()) > 1e-3, name  # a comparison of zeros shows nothing
        assert float((grad - expected.grad).norm()) <= rtol * float(expected.grad.norm()), name


@pytest.mark.parametrize("case", cases.CASES)
def test_logits_loss_and_gradients_match_transformers(
    case: str, model: Qwen2VL, hf_model: HfModel, processor: Qwen2VLProcessor
) -> None:
    inputs = cases.make(case, processor)
    labels = cases.labels_for(inputs)
    model.zero_grad()
    hf_model.zero_grad()
    ours = model(**inputs, labels=labels)
    theirs = hf_model(**cases.for_transformers(inputs, model), labels=labels)
    ours.loss.backward()
    theirs.loss.backward()

    real = inputs["attention_mask"] == 1
    assert theirs.logits[real].std() > 0.5  # flat logits would hide an error
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=0, atol=1e-4)
    assert not ours.logits[~real].any()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    assert_grads_match(model, hf_model)


def test_packed_documents_match_transformers_and_separate_rows(
    model: Qwen2VL, hf_model: HfModel, processor: Qwen2VLProcessor
) -> None:
    documents = [
        processor(f"What {cases.IMAGE} is", [cases.picture(56, 84)]),
        processor("Describe the two videos"),
        processor(f"{cases.IMAGE} user", [cases.picture(84, 56, seed=1)]),
    ]
    ids = torch.cat([d["input_ids"] for d in documents], dim=1)
    text = torch.cat([torch.arange(d["input_ids"].shape[1]) for d in documents])
    rope = torch.cat([cases.positions(d, model)[0] for d in documents], dim=2)
    packed = {
        "input_ids": ids,
        "position_ids": torch.cat([text.view(1, 1, -1), rope]),
        "pixel_values": torch.cat([d["pixel_values"] for d in documents if "pixel_values" in d]),
        "image_grid_thw": torch.cat(
            [d["image_grid_thw"] for d in documents if "pixel_values" in d]
        ),
    }
    logits = model(**packed).logits
    expected = hf_model(**packed, use_cache=False).logits  # a cache would hide the documents
    separate = torch.cat([model(**d).logits for d in documents], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits, separate, rtol=0, atol=1e-5)


def test_num_items_in_batch_divides_the_sum(
    model: Qwen2VL, hf_model: HfModel, processor: Qwen2VLProcessor
) -> None:
    inputs = cases.make("one_image", processor)
    labels = cases.labels_for(inputs)
    ours = model(**inputs, labels=labels, num_items_in_batch=7).loss
    theirs = hf_model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_no_labels_to_learn_from_is_zero_loss_not_nan(
    model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    inputs = cases.make("text", processor)
    assert model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss == 0


def test_inputs_embeds_and_dense_batches_match_input_ids(
    model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    ids = processor("What is in the picture?")["input_ids"].expand(2, -1)
    expected = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
    embeds = model.model.embed_tokens(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected, rtol=0, atol=1e-5)


def test_logits_to_keep_are_the_last_columns(model: Qwen2VL, processor: Qwen2VLProcessor) -> None:
    inputs = cases.make("padded_left", processor)
    expected = model(**inputs).logits[:, -2:]
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, expected)


def test_gradient_checkpointing_runs_layers_again_for_the_same_gradient(
    model: Qwen2VL, processor: Qwen2VLProcessor
) -> None:
    inputs = cases.make("two_images", processor)
    runs: list[torch.nn.Module] = []
    layers = [model.visual.blocks[0], model.model.layers[0]]
    hooks = [x.register_forward_pre_hook(lambda layer, _: runs.append(layer)) for x in layers]
    grads = []
    for enable in (False, True):
        model.gradient_checkpointing_enable(enable)
        model.zero_grad()
        model(**inputs, labels=cases.labels_for(inputs)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert [runs.count(layer) for layer in layers] == ([3, 3] if enable else [1, 1])
    model.gradient_checkpointing_enable(False)
    for hook in hooks:
        hook.remove()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_autocast_trains_close_to_float32(model: Qwen2VL, processor: Qwen2VLProcessor) -> None:
    inputs = cases.make("two_images", processor)
    labels = cases.labels_for(inputs)
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(**inputs, labels=labels)
        assert out.logits.dtype == (torch.bfloat16 if enabled else torch.float32)
        out.loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        assert (grads[1][name] - expected).norm() < 0.05 * expected.norm(), name


def test_a_dense_text_batch_never_waits_for_the_gpu(model: Qwen2VL) -> None:
    """Meta tensors have no values: whatever asks for one on the host raises."""
    with torch.device("meta"):
        valueless = Qwen2VL(model.config)
        ids = torch.zeros(2, 5, dtype=torch.int64)
        out = valueless(ids, labels=ids)
        assert out.logits.shape == (2, 5, model.config.vocab_size)
        out.loss.backward()
        assert valueless.model.embed_tokens.weight.grad.is_meta
        with pytest.raises((NotImplementedError, RuntimeError)):
            valueless(ids, attention_mask=ids)  # a mask decides the number of tokens
