"""transformers' models with our attention against the same with SDPA."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.hf_models import (
    IDS,
    LEFT,
    PACKED,
    PAIRS,
    RAGGED,
    SEEN,
    WORDS,
    clip,
    llama,
    llava,
    mistral,
    qwen2_vl,
    siglip,
)
from vlmkernels.compat.transformers import attention_forward, register

register()
CASES = [
    *((llama, WORDS), (llama, PACKED), (mistral, WORDS), (mistral, PACKED)),
    *((clip, PAIRS), (siglip, PAIRS), (llava, SEEN), (qwen2_vl, RAGGED)),
]


def both(make: Callable[[], Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = make().train()
    theirs.set_attn_implementation("sdpa")
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("vlmkernels")
    assert ours.config._attn_implementation == "vlmkernels"
    return ours, theirs


@pytest.mark.parametrize(
    ("make", "batch"), CASES, ids=[f"{m.__name__}{i}" for i, (m, _) in enumerate(CASES)]
)
def test_training_has_the_same_curve(make: Callable[[], Any], batch: dict[str, Any]) -> None:
    losses: list[list[float]] = []
    ours, theirs = both(make)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for _ in range(3):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] != losses[0][0]


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_has_the_same_tokens(make: Callable[[], Any], cache: str) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    prompt = {"input_ids": IDS, "attention_mask": LEFT, "pad_token_id": 0}
    ours, theirs = both(make)
    with torch.no_grad():  # larger weights: the answer depends on what is attended to
        for model in (ours, theirs):
            torch.manual_seed(1)
            for p in model.parameters():
                p.normal_(std=0.3) if p.ndim > 1 else p.fill_(1.0)
    options |= {"disable_compile": True}
    assert torch.equal(ours.generate(**prompt, **options), theirs.generate(**prompt, **options))


def test_a_saved_model_names_nothing_of_ours(tmp_path: Path) -> None:
    ours, theirs = both(llama)
    ours.save_pretrained(tmp_path)
    assert "vlmkernels" not in (tmp_path / "config.json").read_text()
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(again(IDS).logits, theirs.eval()(IDS).logits)


@pytest.mark.parametrize("option", ["softcap", "position_bias", "s_aux", "cache"])
def test_what_it_cannot_do_is_refused(option: str) -> None:
    q = torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match=f"vlmkernels: {option} is not supported"):
        attention_forward(torch.nn.Module(), q, q, q, None, **{option: 1.0})
    with pytest.raises(ValueError, match="dropout"):
        attention_forward(torch.nn.Module(), q, q, q, None, dropout=0.1)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_see_themselves(causal: bool) -> None:
    q, k, v = (torch.randn(1, heads, 12, 16) for heads in (4, 2, 2))
    ends = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7}
    got, _ = attention_forward(torch.nn.Module(), q, k, v, None, is_causal=causal, **packed)
    parts = [
        attention_forward(torch.nn.Module(), *part, None, is_causal=causal)[0]
        for part in zip(*(x.split([5, 7], dim=2) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(parts, dim=1))
    with pytest.raises(ValueError, match="dropout"):
        attention_forward(torch.nn.Module(), q, k, v, None, dropout=0.1, **packed)


@pytest.mark.parametrize("gradient", [False, True])
def test_one_query_sees_every_key(gradient: bool) -> None:
    q, k, v = (
        torch.randn(2, h, n, 16, requires_grad=gradient) for h, n in ((4, 1), (2, 9), (2, 9))
    )
    got, _ = attention_forward(torch.nn.Module(), q, k, v, None, scaling=0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, wanted.transpose(1, 2))
    assert got.requires_grad == gradient
