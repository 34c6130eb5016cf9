"""transformers' models with our attention against the same with SDPA."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vlmkernels.compat.transformers import attention_forward, register

register()
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {
    **{k: v for k, v in SIZES.items() if k != "vocab_size"},
    **{"image_size": 32, "patch_size": 8},
}
IDS = torch.arange(1, 25).reshape(2, 12)
LEFT = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])


def llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def mistral() -> Any:
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    return transformers.MistralForCausalLM(config)


def clip() -> Any:
    text = {**SIZES, "eos_token_id": 24}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION))


def siglip() -> Any:
    config = transformers.SiglipConfig(text_config=SIZES, vision_config=VISION)
    return transformers.SiglipModel(config)


def llava() -> Any:
    text = {**SIZES, "model_type": "llama"}
    vision = {**VISION, "model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"embed_dim": 32, "hidden_size": 64, "depth": 1, "num_heads": 2}
    config = transformers.Qwen2VLConfig(
        text_config={**SIZES, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 4},
        image_token_id=95,
        video_token_id=94,
        vision_start_token_id=93,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


WORDS = {"input_ids": IDS, "attention_mask": LEFT, "labels": IDS.masked_fill(LEFT == 0, -100)}
PAIRS = {"input_ids": IDS, "pixel_values": pixels(), "return_loss": True}
SEEN = {
    "input_ids": torch.cat([torch.full((2, 16), 95), IDS], dim=1),
    "labels": torch.cat([torch.full((2, 16), -100), IDS], dim=1),
    "pixel_values": pixels(),
}
GRIDS = torch.tensor([[1, 4, 4], [1, 2, 6]])  # images of two sizes, one in each row
RAGGED = {
    "input_ids": torch.tensor([[93, 95, 95, 95, 95, 5, 6], [0, 93, 95, 95, 95, 7, 8]]),
    "attention_mask": torch.tensor([[1] * 7, [0] + [1] * 6]),
    "labels": torch.tensor([[-100] * 5 + [5, 6], [-100] * 5 + [7, 8]]),
    "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]]),
    "pixel_values": torch.randn(28, 96, generator=torch.Generator().manual_seed(0)),
    "image_grid_thw": GRIDS,
}
PACKED = {
    "input_ids": IDS[:1],
    "labels": IDS[:1],
    "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]),
    "use_cache": False,
}
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
