"""T5 and FlanT5 against transformers, on small checkpoints that transformers wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.conftest import Backend
from tests.models.common import (
    assert_compiles_and_recomputes,
    assert_grads_match,
    num_parameters,
    randomize,
    state_of,
)
from vlmkernels.models.t5 import T5, T5Config

KINDS = {
    "flan": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "first": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
}
SEED = torch.Generator().manual_seed(0)
IDS = torch.randint(2, 96, (3, 40), generator=SEED)  # beyond the 16 exact buckets of a direction
MASK = torch.ones_like(IDS)
MASK[1, :14] = 0  # padding on the left
MASK[2, 29:] = 0  # and on the right
LABELS = torch.randint(2, 96, (3, 21), generator=SEED)
LABELS[1, 7:] = -100


def write(path: Path, kind: str) -> None:
    config = transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_decoder_layers=2,  # transformers has no cache for more than num_layers
        num_heads=4,
        relative_attention_max_distance=24,
        decoder_start_token_id=0,
        **KINDS[kind],
    )
    model = transformers.T5ForConditionalGeneration(config)
    randomize(model)
    model.save_pretrained(path)
    if kind == "flan":  # transformers ties them unless both are in the file
        file = path / "model.safetensors"
        head = torch.randn(96, 32, generator=torch.Generator().manual_seed(3)) * 0.1
        save_file(load_file(file) | {"lm_head.weight": head}, file, {"format": "pt"})


@pytest.fixture(scope="module", params=sorted(KINDS))
def checkpoint_dir(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    write(path, request.param)
    return path


@pytest.fixture(scope="module")
def hf_model(checkpoint_dir: Path) -> Any:
    model = transformers.T5ForConditionalGeneration.from_pretrained(checkpoint_dir).eval()
    untied = model.lm_head.weight is not model.shared.weight
    assert untied == (not T5.from_pretrained(checkpoint_dir).config.tie_word_embeddings)
    return model


@pytest.fixture(scope="module")
def model(checkpoint_dir: Path) -> T5:
    return T5.from_pretrained(checkpoint_dir)


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
def test_logits_loss_and_gradients_match_transformers(
    checkpoint_dir: Path, hf_model: Any, mask: torch.Tensor | None
) -> None:
    model = T5.from_pretrained(checkpoint_dir)
    hf_model.zero_grad()
    theirs = hf_model(IDS, attention_mask=mask, labels=LABELS)
    ours = model(IDS, attention_mask=mask, labels=LABELS)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.loss, theirs.loss)
    theirs.loss.backward()
    ours.loss.backward()
    assert (
        hf_model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.any()
    )
    assert_grads_match(model, hf_model, model.own_name)


def test_generation_matches_transformers_and_the_uncached_model(model: T5, hf_model: Any) -> None:
    options = {"max_new_tokens": 20}
    expected = hf_model.generate(
        IDS, attention_mask=MASK, do_sample=False, eos_token_id=None, **options
    )
    ours = model.generate(IDS, attention_mask=MASK, eos_token_id=(), **options)
    assert torch.equal(ours, expected)
    again = torch.zeros(3, 1, dtype=torch.int64)
    for _ in range(20):
        logits = model(IDS, attention_mask=MASK, decoder_input_ids=again).logits
        again = torch.cat([again, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(again, ours)


def test_padding_is_not_seen(model: T5) -> None:
    x = model.language_model.shared(IDS).masked_fill(MASK[..., None] == 0, torch.nan)
    decoder_mask = torch.ones(3, 9, dtype=torch.int64)
    decoder_mask[0, 6:] = 0
    decoder_mask[1, :2] = 0
    ids = LABELS[:, 10:19].clamp(min=2)
    batch = model(
        inputs_embeds=x,
        attention_mask=MASK,
        decoder_input_ids=ids,
        decoder_attention_mask=decoder_mask,
    )
    for i in range(3):
        kept = decoder_mask[i] != 0
        alone = model(IDS[i][MASK[i] != 0][None], decoder_input_ids=ids[i][kept][None])
        torch.testing.assert_close(batch.logits[i][kept], alone.logits[0], rtol=0, atol=1e-5)
    answer = model.generate(IDS, attention_mask=MASK, max_new_tokens=6, eos_token_id=())
    from_embeds = model.generate(
        inputs_embeds=x, attention_mask=MASK, max_new_tokens=6, eos_token_id=()
    )
    assert torch.equal(from_embeds, answer)


def test_half_precision_is_near(checkpoint_dir: Path, model: T5) -> None:
    expected = model(IDS, attention_mask=MASK, labels=LABELS).logits
    half = T5.from_pretrained(checkpoint_dir, dtype=torch.bfloat16)
    output = half(IDS, attention_mask=MASK, labels=LABELS)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits.float() - expected).norm() < 0.03 * expected.norm()
    assert half.generate(IDS, attention_mask=MASK, max_new_tokens=3, eos_token_id=()).shape == (
        3,
        4,
    )


def test_gradients_recomputed_and_compiled_are_the_same(tmp_path: Path) -> None:
    write(tmp_path, "flan")
    model = T5.from_pretrained(tmp_path)
    labels = LABELS.clamp(min=2)
    assert_compiles_and_recomputes(model, lambda run: run(IDS, labels=labels).loss)


def test_every_backend_computes_the_same_model(backend: Backend, tmp_path: Path) -> None:
    write(tmp_path, "flan")
    ids, mask, labels = IDS[:, 10:24], MASK[:, 10:24], LABELS[:, :5]
    exact = T5.from_pretrained(tmp_path)
    expected = exact(ids, attention_mask=mask, labels=labels)
    model = T5.from_pretrained(tmp_path, dtype=torch.bfloat16, device=backend.device)
    inputs = {"attention_mask": mask, "labels": labels}
    inputs = {name: x.to(backend.device) for name, x in inputs.items()}
    output = model(ids.to(backend.device), **inputs)
    logits = output.logits.detach().float().cpu()
    assert (logits - expected.logits).norm() < 0.03 * expected.logits.norm()
    for run in (expected, output):
        run.loss.backward()
    for name in ("encoder", "decoder"):
        table = (
            f"language_model.{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        )
        grads = [dict(x.named_parameters())[table].grad for x in (exact, model)]
        assert (grads[1].float().cpu() - grads[0]).norm() < 0.05 * grads[0].norm()
    tokens = torch.tensor([5, 9, 30, 41, 6, 7], device=backend.device)  # two answers a prompt
    logits, state = model.prefill(
        2, input_ids=ids.to(backend.device), attention_mask=inputs["attention_mask"]
    )
    state.select(torch.arange(6, device=backend.device) // 2)
    steps = torch.stack([logits.repeat_interleave(2, 0), model.decode(tokens, state)], dim=1)
    answers = torch.stack([torch.zeros_like(tokens), tokens], dim=1).cpu()
    ids, mask = (x.repeat_interleave(2, 0) for x in (ids, mask))
    expected = exact(ids, attention_mask=mask, decoder_input_ids=answers).logits.detach()
    assert (steps.float().cpu() - expected).norm() < 0.03 * expected.norm()


def test_checkpoints_in_and_out(checkpoint_dir: Path, model: T5, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    ours, theirs = state_of(tmp_path), state_of(checkpoint_dir)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    expected = model(IDS, labels=LABELS).logits
    torch.testing.assert_close(again(IDS, labels=LABELS).logits, expected, rtol=0, atol=1e-4)
    assert T5Config.from_dict(model.config.to_dict()) == model.config
    assert T5Config.from_dict(again.config.to_dict()) == model.config
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    old = theirs | {unused: torch.ones(32, 4)}
    old |= {
        f"{stack}.embed_tokens.weight": old["shared.weight"].clone()
        for stack in ("encoder", "decoder")
    }
    save_file(old, tmp_path / "model.safetensors")
    loaded = T5.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "parameters"), [("flan-t5-xl", 2_849_757_184), ("flan-t5-xxl", 11_135_332_352)]
)
def test_published_sizes_have_the_published_parameters(name: str, parameters: int) -> None:
    config = T5Config.preset(name)
    assert num_parameters(lambda: T5(config)) == parameters
    theirs = transformers.T5Config(**config.to_dict())
    tied = num_parameters(lambda: transformers.T5ForConditionalGeneration(theirs))
    assert tied == parameters - config.vocab_size * config.d_model


def test_a_new_model_starts_with_moderate_logits() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    loss = T5(config)(IDS, labels=LABELS).loss.detach()
    assert 4 < float(loss) < 5.5  # log(96) = 4.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj: expected one of"),
        ({"model_type": "mt5"}, "model_type: expected t5, got 'mt5'"),
        ({"relative_attention_num_buckets": 30}, "num_buckets: expected a multiple of 4, got 30"),
        ({"relative_attention_max_distance": 16}, "max_distance: expected more than half"),
        ({"d_kv": 0}, "d_kv: expected a positive integer, got 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, got 1"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        T5Config.from_dict(change)


def test_wrong_arguments_are_named(model: T5) -> None:
    hole = MASK.clone()
    hole[0, 5] = 0
    start = torch.zeros(2, 1, dtype=torch.int64)
    for arguments, message in (
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS}, "decoder_input_ids: expected them or labels, got neither"),
        ({"input_ids": IDS, "decoder_input_ids": start}, "decoder_input_ids: expected 3 rows"),
        ({"input_ids": IDS + 96, "labels": LABELS}, r"^input_ids: expected in \[0, 96\)"),
        ({"input_ids": IDS, "labels": LABELS + 96}, r"^labels: expected -100 or in \[0, 96\)"),
        ({"input_ids": IDS, "attention_mask": MASK[:, 1:]}, "attention_mask: expected shape"),
        (
            {"input_ids": IDS, "attention_mask": hole},
            "attention_mask: expected padding at the ends",
        ),
        ({"input_ids": IDS, "attention_mask": MASK * 0}, "expected a token in every row"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    for labels, error, message in (
        (LABELS[0], ValueError, r"^labels: expected shape \(batch, seqlen\), got \(21,\)"),
        (LABELS.float(), TypeError, "^labels: expected int32 or int64, got torch.float32"),
    ):
        with pytest.raises(error, match=message):
            model(IDS, labels=labels)
