"""BLIP-2's first-stage training against a transcription of LAVIS', and the masks of its passes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.conftest import Backend
from tests.models.blip2.conftest import pixels
from tests.models.blip2.lavis import Lavis
from tests.models.common import assert_compiles_and_recomputes, randomize, state_of
from vlmkernels.models import load
from vlmkernels.models.blip2 import (
    Blip2Config,
    Blip2Pretraining,
    Blip2QFormerConfig,
    Blip2Retrieval,
    Blip2VisionConfig,
)
from vlmkernels.models.blip2.config import PRETRAINING
from vlmkernels.models.blip2.pretraining import hard_negatives
from vlmkernels.models.blip2.qformer import apart, joint
from vlmkernels.models.packing import make_packing

BATCH, SEQLEN, QUERIES = 4, 7, 5
IDS = torch.randint(1, 39, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(SEQLEN) < torch.tensor([7, 3, 5, 1])[:, None]).long()
LEFT = MASK.flip(1)


def make_model(num_layers: int = 4) -> Blip2Pretraining:
    config = Blip2Config(
        PRETRAINING,
        num_query_tokens=QUERIES,
        image_text_hidden_size=24,
        caption_token_id=39,
        vision=Blip2VisionConfig(32, 48, num_layers // 2, 2, image_size=32, patch_size=8),
        qformer=Blip2QFormerConfig(
            40,
            *(48, num_layers, 3, 64),
            max_position_embeddings=16,
            encoder_hidden_size=32,
            use_qformer_text_input=True,
        ),
    )
    model = Blip2Pretraining(config).eval()
    randomize(model)
    return model


def parameters(model: Blip2Pretraining) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def dense(model: Blip2Pretraining, image: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """(batch, queries + seqlen, dim) in one pass over the padded grid under an explicit mask."""
    lavis = Lavis(model.config, parameters(model))
    x = torch.cat([lavis.queries(BATCH), lavis.embed(IDS)], dim=1)
    return lavis.bert(x, QUERIES, image, seen, None)[0]


def mask_of(kind: str) -> torch.Tensor:
    """(batch, queries + seqlen, queries + seqlen): the masks of figure 2 of the paper."""
    is_word = torch.arange(QUERIES + SEQLEN) >= QUERIES
    place = torch.arange(QUERIES + SEQLEN)
    if kind == "contrast":
        seen = is_word[:, None] == is_word
    elif kind == "matching":
        seen = torch.ones(len(place), len(place), dtype=torch.bool)
    else:
        seen = ~is_word | (is_word[:, None] & (place <= place[:, None]))
    exists = torch.cat([torch.ones(BATCH, QUERIES, dtype=torch.int64), MASK], dim=1).bool()
    return seen & exists[:, None]


@pytest.mark.parametrize("kind", ["contrast", "matching", "captioning"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_one_pass_is_the_dense_mask(kind: str, dtype: torch.dtype) -> None:
    model, packing = make_model().to(dtype), make_packing(BATCH, SEQLEN, torch.device("cpu"), MASK)
    image = torch.randn(BATCH, 17, 32, dtype=dtype, generator=torch.Generator().manual_seed(1))
    if kind == "contrast":
        layout = apart(BATCH, QUERIES, packing, image.device)
    else:
        layout = joint(BATCH, QUERIES, packing, causal=kind == "captioning")
    words = model.embed(model.read(IDS, MASK))
    queries, words = model.qformer(model.queries(BATCH), image, words, layout)
    expected = dense(model.double(), image.double(), mask_of(kind))
    tolerance = {"rtol": 0, "atol": 2e-5 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(queries.double(), expected[:, :QUERIES], **tolerance)
    torch.testing.assert_close(words.double(), expected[:, QUERIES:][MASK.bool()], **tolerance)


def test_padding_is_never_read_on_either_side() -> None:
    model, ids = make_model(), IDS.where(MASK.bool(), 0)
    flipped = torch.zeros_like(ids).masked_scatter(LEFT.bool(), ids[MASK.bool()])
    out, left = (
        model(pixels(BATCH), x, mask, torch.Generator().manual_seed(0))
        for x, mask in ((ids, MASK), (flipped, LEFT))
    )
    torch.testing.assert_close(left.loss, out.loss)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0] = torch.nan
    poisoned = model(pixels(BATCH), ids, MASK, torch.Generator().manual_seed(0))
    for name in ("loss_itc", "loss_itm"):  # all words are in the head of the captions
        assert torch.equal(getattr(poisoned, name), getattr(out, name))


@pytest.mark.parametrize("mask", [MASK, None], ids=["padded", "full"])
def test_losses_and_gradients_are_those_of_lavis(mask: torch.Tensor | None) -> None:
    model = make_model().double()
    lavis = Lavis(model.config, parameters(model))
    images = pixels(BATCH).double()
    out = model(images, IDS, mask, torch.Generator().manual_seed(7))
    expected = lavis.losses(
        model.vision_model(images),
        IDS,
        torch.ones_like(IDS) if mask is None else mask,
        torch.Generator().manual_seed(7),
    )
    names = list(parameters(model))
    for name, theirs in zip(("itc", "itm", "itg"), expected, strict=True):
        ours = getattr(out, f"loss_{name}")
        # Losses are computed in float32.
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0, msg=name)
        grads = [
            torch.autograd.grad(
                x, list(parameters(model).values()), retain_graph=True, allow_unused=True
            )
            for x in (ours, theirs)
        ]
        for of, a, b in zip(names, *grads, strict=True):
            assert (a is None) == (b is None) or not (a if b is None else b).any(), (name, of)
            if a is not None and b is not None:
                assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9, (name, of)
    torch.testing.assert_close(out.loss, out.loss_itc + out.loss_itm + out.loss_itg)


def test_wrong_pairs_are_never_right_ones_and_prefer_the_similar() -> None:
    similarity = torch.full((3, 3), -9.0)
    similarity[0, 2] = similarity[1, 0] = similarity[2, 1] = 9.0
    similarity.fill_diagonal_(100.0)
    seeds = [torch.Generator().manual_seed(i) for i in range(50)]
    assert all(hard_negatives(similarity, seed).tolist() == [2, 0, 1] for seed in seeds)
    even = torch.stack([hard_negatives(torch.eye(3), seed) for seed in seeds])
    assert not (even == torch.arange(3)).any()
    assert 10 < int((even[:, 0] == 1).sum()) < 40


def test_it_learns_to_tell_pairs_and_to_caption() -> None:
    model = make_model().train()
    model.reset_parameters()
    model.vision_model.requires_grad_(False)
    torch.manual_seed(0)
    with torch.no_grad():  # else all images look alike to a new tower
        model.vision_model.embeddings.patch_embedding.weight.normal_(std=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    images, losses = pixels(BATCH), []
    for step in range(30):
        optimizer.zero_grad()
        out = model(images, IDS, MASK, torch.Generator().manual_seed(step))
        out.loss.backward()
        optimizer.step()
        losses.append([float(x.detach()) for x in (out.loss_itc, out.loss_itg)])
    # From chance, log 4 and log 40, towards what label smoothing leaves: 0.35 and 0.7.
    assert losses[0][0] > 1.2 and losses[0][1] > 3.5
    assert losses[-1][0] < 1.1 and losses[-1][1] < 2.0


def test_a_checkpoint_keeps_its_training_heads(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "own")
    names = state_of(tmp_path / "own").keys()
    again = load(tmp_path / "own")
    assert isinstance(again, Blip2Pretraining) and again.config == model.config
    assert {"temp", "cls.predictions.bias", "cls.predictions.transform.dense.weight"} < names
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    theirs = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "own").eval()
    retrieval = Blip2Retrieval(model.config).eval().take(model)
    inputs = {"pixel_values": pixels(BATCH), "input_ids": IDS, "attention_mask": MASK}
    for match in (False, True):
        ours = retrieval(**inputs, use_image_text_matching_head=match).logits_per_image
        expected = theirs(**inputs, use_image_text_matching_head=match).logits_per_image
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("old", [False, True])
def test_it_starts_from_bert(old: bool, tmp_path: Path) -> None:
    """Texts alone are then read as by BERT, and words predicted as by its head."""
    config = transformers.BertConfig(
        vocab_size=39,  # all but [DEC]
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    bert = transformers.BertForMaskedLM(config).eval()
    randomize(bert)
    with torch.no_grad():
        bert.bert.embeddings.token_type_embeddings.weight.zero_()  # the Q-Former has none
    bert.save_pretrained(tmp_path)
    if old:
        state = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for name, tensor in state_of(tmp_path).items()
        }
        save_file(state, tmp_path / "model.safetensors")
    model = make_model()
    dec = model.embeddings.word_embeddings.weight[39].clone()
    model.take_bert(tmp_path)
    texts = model.read(IDS, MASK)
    _, words = model.qformer(None, None, model.embed(texts), apart(0, 0, texts.packing, IDS.device))
    logits = model.cls(words, model.embeddings.word_embeddings.weight)[:, :39]
    expected = bert(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    layer = model.qformer.encoder.layer[1]
    assert torch.equal(layer.output_query.dense.weight, layer.output.dense.weight)
    assert torch.equal(layer.intermediate_query.dense.bias, layer.intermediate.dense.bias)
    assert torch.equal(model.embeddings.word_embeddings.weight[39], dec)
    binary = tmp_path / "bin"  # as older checkpoints have it
    binary.mkdir()
    torch.save(state_of(tmp_path), binary / "pytorch_model.bin")
    again = make_model().take_bert(binary)
    assert all(torch.equal(x, parameters(again)[name]) for name, x in parameters(model).items())
    save_file(
        {"bert.encoder.layer.0.output.dense.bias": torch.ones(48)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match="expected a BERT, it does not have"):
        model.take_bert(tmp_path)


def test_the_tied_head_of_lavis_is_read(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    file, state = tmp_path / "model.safetensors", state_of(tmp_path)
    words = state["embeddings.word_embeddings.weight"]
    tied = {"decoder.weight": words.clone(), "decoder.bias": state["cls.predictions.bias"].clone()}
    save_file(state | {f"cls.predictions.{k}": v for k, v in tied.items()}, file)
    assert torch.equal(load(tmp_path).embeddings.word_embeddings.weight, words)


def test_gradients_recomputed_and_compiled_are_the_same() -> None:
    def loss(run: Callable[..., Any]) -> torch.Tensor:
        value: torch.Tensor = run(pixels(2), IDS[:2]).loss  # of two, the wrong one is certain
        return value

    assert_compiles_and_recomputes(make_model(2), loss)


def test_every_backend_computes_the_same_losses(backend: Backend) -> None:
    model, inputs = make_model(), (pixels(2), IDS[:2], MASK[:2])  # of two, no choice is drawn
    expected = model(*inputs)
    half = copy.deepcopy(model).to(backend.device, torch.bfloat16)
    out = half(*(x.to(backend.device) for x in inputs))
    for name in ("loss_itc", "loss_itm", "loss_itg"):
        ours, theirs = float(getattr(out, name).detach()), float(getattr(expected, name).detach())
        assert ours == pytest.approx(theirs, rel=0.05), name


def test_autocast_trains_close_to_float32() -> None:
    model, grads = make_model(), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(pixels(2), IDS[:2], MASK[:2]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        if not name.endswith("key.bias"):  # rounding noise
            assert (grads[1][name] - expected).norm() < 0.15 * expected.norm(), name


def test_wrong_arguments_are_named() -> None:
    model = make_model()
    for args, message in (
        ((pixels(1), IDS[:1]), "expected at least two images, one for each text, got 1 and 1"),
        ((pixels(3), IDS), "got 3 and 4 texts"),
        ((pixels(4), IDS, torch.zeros_like(IDS)), "expected a token in every row"),
        ((pixels(4), IDS, MASK[:, 1:]), r"attention_mask: expected shape \(4, 7\), got \(4, 6\)"),
        ((pixels(4), IDS[0]), r"input_ids: expected shape \(batch, seqlen\), got \(7,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*args)
    config = dataclasses.replace(model.config, caption_token_id=40)
    with pytest.raises(ValueError, match=r"caption_token_id: expected below .* = 40, got 40"):
        Blip2Pretraining(config)
