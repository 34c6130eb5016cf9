"""Qwen-VL against a transcription in plain PyTorch, and against itself."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.rivals.qwen_vl import PlainQwenVL
from tests.conftest import Backend
from tests.models.common import assert_compiles_and_recomputes, randomize
from tests.models.qwen_vl.conftest import IMG, NUM_SLOTS, load_model
from vlmkernels.distributed import context_parallel
from vlmkernels.models.qwen_vl import QwenVisionConfig, QwenVL, QwenVLConfig
from vlmkernels.models.qwen_vl.language import logn_scale, ntk_alpha
from vlmkernels.models.qwen_vl.weights import published_name
from vlmkernels.testing.ranks import run_ranks

Inputs = dict[str, Any]
IMAGE = [IMG, *[IMG + 2] * NUM_SLOTS, IMG + 1]


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 285, (length,), generator=generator).tolist()


def pixels(num_images: int, size: int = 56) -> torch.Tensor:
    return torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(1))


def padded(rows: list[list[int]], side: str) -> Inputs:
    seqlen = max(map(len, rows))
    ids, mask = torch.full((len(rows), seqlen), 299), torch.zeros(len(rows), seqlen).long()
    for i, row in enumerate(rows):
        place = slice(seqlen - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


# Shorter and longer than the 64 tokens of seq_length, and than twice as many.
ROWS = [text(5) + IMAGE + text(4, 1), text(90, 2), IMAGE + text(130, 3), text(3, 4)]
PIXELS, PIXELS_1 = {"pixel_values": pixels(2)}, {"pixel_values": pixels(1)}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_are_those_of_plain_pytorch(mode: str) -> None:
    model = load_model().train(mode == "train")
    own = {published_name(n): p for n, p in copy.deepcopy(model).named_parameters()}
    plain = PlainQwenVL(own, model.config, sdpa=False)
    plain.training = model.training
    ids = torch.tensor([text(80) + IMAGE + text(5, 1), IMAGE + text(85, 2)])
    labels = ids.masked_fill(ids >= IMG, -100)
    ours = model(ids, labels=labels, **PIXELS)
    theirs = plain(ids, labels=labels, **PIXELS)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    for name, parameter in model.named_parameters():
        expected = own[published_name(name)].grad
        if name.endswith("pos_embed"):
            assert parameter.grad is None and expected is None
            continue
        assert float((parameter.grad - expected).norm()) <= 1e-3 * float(expected.norm()), name


def test_ntk_and_logn_by_hand() -> None:
    """A prompt of up to 2048 tokens is as trained; up to 4096 the base grows 3-fold, ..."""
    lengths = torch.tensor([1, 2048, 2049, 4096, 4097, 8192, 8193])
    assert ntk_alpha(lengths, 2048).tolist() == [1, 1, 3, 3, 7, 7, 15]
    scale = logn_scale(torch.tensor([0, 2047, 4095]), 2048).tolist()
    assert scale == [1.0, 1.0, pytest.approx(12 / 11)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_computed_as_it_is_alone(side: str, model: QwenVL) -> None:
    inputs = padded(ROWS, side)
    logits = model(**inputs, **PIXELS).logits
    images = iter(PIXELS["pixel_values"])
    for i, row in enumerate(ROWS):
        own = {"pixel_values": next(images)[None]} if IMG in row else {}
        alone = model(torch.tensor([row]), **own).logits[0]
        real = inputs["attention_mask"][i] == 1
        torch.testing.assert_close(logits[i][real], alone, rtol=0, atol=1e-4)
        assert not logits[i][~real].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_generate_what_single_rows_do(side: str, model: QwenVL) -> None:
    """Three bases in one batch, each kept while the cache grows."""
    options: Inputs = {"max_new_tokens": 8, "eos_token_id": ()}
    together = model.generate(**padded(ROWS, side), **PIXELS, **options)[:, -8:]
    images = iter(PIXELS["pixel_values"])
    for i, row in enumerate(ROWS):
        own = {"pixel_values": next(images)[None]} if IMG in row else {}
        alone = model.generate(torch.tensor([row]), **own, **options)[0, -8:]
        assert torch.equal(together[i], alone)


@pytest.mark.parametrize("prompt", [40, 100])
def test_cached_equals_uncached(prompt: int, model: QwenVL) -> None:
    """On one side of a step of NTK, where the uncached model has the same base."""
    ids = torch.tensor([IMAGE + text(prompt, 5)])
    logits, state = model.prefill(6, input_ids=ids, **PIXELS_1)
    for token in text(6, 6):
        uncached = model(ids, **PIXELS_1).logits[:, -1]
        torch.testing.assert_close(logits, uncached, rtol=0, atol=1e-4)
        logits = model.decode(torch.tensor([token]), state)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_beam_search_keeps_each_prompts_base(model: QwenVL) -> None:
    options: Inputs = {"max_new_tokens": 6, "eos_token_id": (), "num_beams": 3}
    together = model.generate(**padded(ROWS, "left"), **PIXELS, **options)[:, -6:]
    for row, expected in zip(ROWS[1::2], together[1::2], strict=True):
        assert torch.equal(model.generate(torch.tensor([row]), **options)[0, -6:], expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_tokens_spread_over_ranks(mode: str) -> None:
    model = load_model().train(mode == "train")
    batch = padded(ROWS, "right") | PIXELS
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels).loss.detach()

    def work(transport: Any) -> torch.Tensor:
        with context_parallel(transport, ulysses=False):
            return model(**batch, labels=labels).loss.detach()

    for loss in run_ranks(3, work):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_documents_in_a_row_do_not_see_each_other(model: QwenVL) -> None:
    documents = [text(70, 7), IMAGE + text(9, 8), text(140, 9)]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    packed = model(
        torch.tensor([[i for d in documents for i in d]]), position_ids=positions, **PIXELS_1
    ).logits
    images: list[Inputs] = [{}, PIXELS_1, {}]
    separate = [
        model(torch.tensor([d]), **x).logits for d, x in zip(documents, images, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), rtol=0, atol=1e-4)


def test_training_without_images_defines_every_gradient() -> None:
    model, ids = load_model().train(), torch.tensor([text(12)])
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.any() != name.startswith("visual."), name
    torch.testing.assert_close(model(ids).logits, model.eval()(ids).logits)


def test_images_of_other_sizes(model: QwenVL) -> None:
    """Any square; 224 pixels is the published table's own grid."""
    plain = PlainQwenVL(
        {published_name(n): x for n, x in model.state_dict().items()}, model.config, sdpa=True
    )
    for size in (14, 70, 224):
        torch.testing.assert_close(
            model.image_features(pixels(1, size)), plain.vision(pixels(1, size)), rtol=0, atol=1e-4
        )


def test_heads_of_the_published_width(backend: Backend) -> None:
    """head_dim 104 in the tower, 128 in two heads of the resampler and in the language model."""
    visual = QwenVisionConfig(28, 14, 208, 1, 2, 1.0, 256, 4, image_start_id=90)
    config = QwenVLConfig(96, 256, 64, 1, 2, 128, seq_length=64, visual=visual)
    model = QwenVL(config).eval()
    randomize(model)
    own = {published_name(n): x for n, x in model.state_dict().items()}
    ids = torch.tensor([[90, *[92] * 4, 91, *range(9)]])
    expected = PlainQwenVL(own, config, sdpa=True)(ids, pixel_values=pixels(1, 28)).logits
    moved = model.to(backend.device)
    inputs = {"input_ids": ids, "pixel_values": pixels(1, 28)}
    logits = moved(**{name: x.to(backend.device) for name, x in inputs.items()}).logits.cpu()
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


def test_gradients_recomputed_and_compiled_are_the_same() -> None:
    """Beyond seq_length in eval mode: NTK and LogN are part of the graph."""
    ids = torch.tensor([IMAGE + text(60)])
    labels = ids.masked_fill(ids >= IMG, -100)
    assert_compiles_and_recomputes(
        load_model(), lambda run: run(ids, labels=labels, **PIXELS_1).loss
    )


def test_every_backend_computes_the_same_model(backend: Backend, model: QwenVL) -> None:
    inputs = {"input_ids": torch.tensor([IMAGE + text(4)]), **PIXELS_1}
    expected = model(**inputs).logits.detach()
    half = copy.deepcopy(model).to(backend.device, torch.bfloat16)
    logits = half(**{name: x.to(backend.device) for name, x in inputs.items()}).logits
    assert (logits.detach().float().cpu() - expected).norm() < 0.03 * expected.norm()


def test_wrong_arguments_are_named(model: QwenVL) -> None:
    ids = torch.tensor([text(2) + IMAGE])
    cases: list[tuple[Inputs, str]] = [
        ({"pixel_values": None}, "pixel values: expected for 16 image tokens, got None"),
        ({"pixel_values": pixels(2)}, "expected 32 image tokens .*, got 16"),
        ({"pixel_values": pixels(1)[:, :, :42]}, "expected square images, .* got 42 x 56"),
        ({"pixel_values": pixels(1, 50)}, "a multiple of 14 a side, got 50 x 50"),
        ({"pixel_values": pixels(1)[:, :2]}, "pixel_values: expected shape"),
        ({"input_ids": ids[:, :-1]}, "expected 16 places between <img> and </img>, got unpaired"),
        ({"input_ids": ids[:, ids[0] != IMG + 2]}, r"expected 16 places .*, got \[0\]"),
        ({"input_ids": ids.flip(1)}, "expected 16 places between <img> and </img>, got"),
        ({"input_ids": ids.view(2, -1)[:, :10]}, "expected 16 places"),
        ({"input_ids": ids + 10}, r"input_ids: expected in \[0, 300\)"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask: expected shape"),
        ({"position_ids": torch.ones(1, 3)}, "position_ids: expected shape"),
        ({"inputs_embeds": torch.zeros(1, 2, 128)}, "exactly one of input_ids and inputs_embeds"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": ids, **PIXELS_1} | change)
    with pytest.raises(TypeError, match="pixel_values: expected floating point"):
        model(ids, pixel_values=torch.zeros(1, 3, 56, 56, dtype=torch.uint8))


def test_chatml_ends_with_a_turn(model: QwenVL) -> None:
    """Its tokens follow <|endoftext|>, here 60, in the vocabulary."""
    chat = copy.copy(model)
    chat.generation_config = {"eos_token_id": 60, "chat_format": "chatml"}
    assert chat._eos_token_ids(None) == [60, 61, 62]
    assert chat._eos_token_ids(5) == [5]
    chat.generation_config = {"eos_token_id": 60, "chat_format": "raw"}
    assert chat._eos_token_ids(None) == [60]


def test_without_ntk_and_logn_long_prompts_are_as_in_training(model: QwenVL) -> None:
    config = replace(model.config, use_dynamic_ntk=False, use_logn_attn=False)
    plain = QwenVL(config)
    plain.load_state_dict(model.state_dict())
    ids = torch.tensor([text(100)])
    torch.testing.assert_close(plain.eval()(ids).logits, plain.train()(ids).logits)
    assert not torch.allclose(plain(ids).logits, model(ids).logits)
