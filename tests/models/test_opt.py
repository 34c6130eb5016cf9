"""OPT against transformers, on a small checkpoint that transformers wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.models.common import (
    assert_compiles_and_recomputes,
    assert_grads_match,
    num_parameters,
    randomize,
    state_of,
)
from vlmkernels.distributed import context_parallel
from vlmkernels.models.opt import OPT, OPTConfig
from vlmkernels.testing.ranks import run_ranks

IDS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0  # padding on the left
MASK[2, 6:] = 0  # and on the right


def write(path: Path, **options: Any) -> None:
    config = transformers.OPTConfig(
        vocab_size=96,
        hidden_size=80,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=1,  # head_dim 80, as of OPT-2.7B
        max_position_embeddings=32,
        word_embed_proj_dim=80,
        **options,
    )
    model = transformers.OPTForCausalLM(config)
    randomize(model)
    model.save_pretrained(path)


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("opt")
    write(path)
    return path


@pytest.fixture(scope="module")
def hf_model(checkpoint_dir: Path) -> Any:
    return transformers.OPTForCausalLM.from_pretrained(checkpoint_dir).eval()


@pytest.fixture(scope="module")
def model(checkpoint_dir: Path) -> OPT:
    return OPT.from_pretrained(checkpoint_dir)


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "padded"])
def test_logits_loss_and_gradients_match_transformers(
    checkpoint_dir: Path, hf_model: Any, mask: torch.Tensor | None
) -> None:
    model = OPT.from_pretrained(checkpoint_dir)
    labels = IDS.masked_fill(torch.rand(IDS.shape) < 0.3, -100)
    if mask is not None:
        labels = labels.masked_fill(mask == 0, -100)
        labels[1, 4] = -100  # transformers predicts it from padding
    hf_model.zero_grad()
    theirs = hf_model(IDS, attention_mask=mask, labels=labels)
    ours = model(IDS, attention_mask=mask, labels=labels)
    real = MASK.bool() if mask is not None else torch.ones_like(IDS, dtype=torch.bool)
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.loss, theirs.loss)
    theirs.loss.backward()
    ours.loss.backward()
    assert_grads_match(model, hf_model, lambda name: model.own_name(name))


def test_generation_matches_transformers_and_the_uncached_model(model: OPT, hf_model: Any) -> None:
    ids, mask = IDS[:2], MASK[:2]  # transformers generates after padding on the left only
    options = {"max_new_tokens": 8, "eos_token_id": None}
    expected = hf_model.generate(ids, attention_mask=mask, do_sample=False, **options)
    ours = model.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=())
    assert torch.equal(ours, expected)
    again = ids
    for _ in range(8):
        longer = torch.cat([mask, mask.new_ones(2, again.shape[1] - ids.shape[1])], dim=1)
        token = model(again, attention_mask=longer, logits_to_keep=1).logits[:, -1].argmax(-1)
        again = torch.cat([again, token[:, None]], dim=1)
    assert torch.equal(again, ours)


def test_padding_is_not_seen(model: OPT) -> None:
    x = model.decoder.embed_tokens(IDS)
    batch = model(inputs_embeds=x.masked_fill(MASK[..., None] == 0, torch.nan), attention_mask=MASK)
    for i in range(len(IDS)):
        alone = model(IDS[i][MASK[i] != 0][None]).logits[0]
        torch.testing.assert_close(batch.logits[i][MASK[i] != 0], alone, rtol=0, atol=1e-5)


def test_documents_in_a_row_do_not_see_each_other(model: OPT) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(IDS[:1], position_ids=positions).logits
    separate = torch.cat([model(IDS[:1, :4]).logits, model(IDS[:1, 4:]).logits], dim=1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)


def test_half_precision_is_near(checkpoint_dir: Path, model: OPT) -> None:
    expected = model(IDS, attention_mask=MASK).logits
    half = OPT.from_pretrained(checkpoint_dir, dtype=torch.bfloat16)
    logits = half(IDS, attention_mask=MASK, labels=IDS).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.025 * expected.norm()
    assert half.generate(IDS, attention_mask=MASK, max_new_tokens=3).shape == (3, 12)


def test_gradients_recomputed_and_compiled_are_the_same(checkpoint_dir: Path) -> None:
    model = OPT.from_pretrained(checkpoint_dir)
    assert_compiles_and_recomputes(model, lambda run: run(IDS, labels=IDS).loss)


def test_tokens_spread_over_ranks(model: OPT) -> None:
    expected = model(IDS, attention_mask=MASK, labels=IDS)

    def work(transport: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), context_parallel(transport, layout="contiguous"):
            out = model(IDS, attention_mask=MASK, labels=IDS)
        return out.loss, out.logits

    losses, logits = zip(*run_ranks(3, work), strict=True)
    for loss in losses:
        torch.testing.assert_close(loss, expected.loss)
    real = expected.logits[MASK != 0]
    torch.testing.assert_close(torch.cat(logits), real, rtol=1e-4, atol=1e-4)


def test_checkpoints_in_and_out(checkpoint_dir: Path, model: OPT, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    ours, theirs = state_of(tmp_path / "ours"), state_of(checkpoint_dir)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "model.decoder.layers.1.self_attn.out_proj.bias" in ours
    again = transformers.OPTForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    old = {name.removeprefix("model."): tensor for name, tensor in theirs.items()}
    save_file(old, tmp_path / "ours" / "model.safetensors")
    loaded = OPT.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize(("name", "parameters"), [("2.7B", 2_651_596_800), ("6.7B", 6_658_473_984)])
def test_published_sizes_have_the_published_parameters(name: str, parameters: int) -> None:
    config = OPTConfig.preset(name)
    assert num_parameters(lambda: OPT(config)) == parameters
    theirs = transformers.OPTConfig(**config.to_dict())
    assert num_parameters(lambda: transformers.OPTForCausalLM(theirs)) == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_layer_norm_before": False}, "do_layer_norm_before: expected True, got False"),
        ({"enable_bias": False}, "enable_bias: expected True"),
        ({"activation_function": "gelu"}, "activation_function: expected 'relu', got 'gelu'"),
        ({"word_embed_proj_dim": 512}, "word_embed_proj_dim: expected 768, got 512"),
        ({"model_type": "llama"}, "model_type: expected opt, got 'llama'"),
        ({"hidden_size": 100}, "hidden_size: expected a multiple of 12 heads, got 100"),
        ({"ffn_dim": 0}, "ffn_dim: expected a positive integer, got 0"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPTConfig.from_dict(change)


def test_wrong_arguments_are_named(model: OPT) -> None:
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="position_ids: expected less than 32, got 32"):
        model(torch.full((1, 33), 5))
    with pytest.raises(ValueError, match=r"max_new_tokens: expected at most 32 tokens .* got 33"):
        model.generate(IDS, max_new_tokens=24)
    with pytest.raises(ValueError, match="attention_mask: expected shape"):
        model(IDS, attention_mask=MASK[:, 1:])
    with pytest.raises(ValueError, match="expected a token in every row"):
        model.generate(IDS, attention_mask=MASK * 0)
