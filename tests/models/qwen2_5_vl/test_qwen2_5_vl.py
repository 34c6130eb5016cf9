"""Qwen2.5-VL against transformers, on a checkpoint that transformers wrote."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import vision_utils

from tests.conftest import Backend
from tests.models.common import (
    assert_compiles_and_recomputes,
    assert_grads_match,
    num_parameters,
    picture,
    state_of,
)
from tests.models.qwen2_vl import cases
from vlmkernels.models import load, load_processor
from vlmkernels.models.qwen2_5_vl import Qwen25VL, Qwen25VLConfig, Qwen25VLProcessor, window_order
from vlmkernels.models.qwen2_vl import vision as vision_module
from vlmkernels.models.qwen2_vl.model import Qwen2VLInputs
from vlmkernels.models.qwen2_vl.video import frame_indices
from vlmkernels.models.qwen2_vl.weights import published_name

# Grids of patches: 10 x 14 (windows cut on both sides), 8 x 16 (none cut), 4 x 4 (less than one).
WIDE, WHOLE, SMALL = picture(140, 196), picture(112, 224, seed=1), picture(56, 56, seed=2)


def make(name: str, processor: Qwen25VLProcessor) -> dict[str, Any]:
    if name == "images":
        return processor(f"{cases.IMAGE} and {cases.IMAGE}What is?", [WIDE, WHOLE])
    if name == "padded":
        texts = [f"a {cases.IMAGE} What?", "Describe the two videos", f"{cases.IMAGE}user"]
        return processor(texts, [SMALL, WIDE], padding_side="left")
    if name == "video":
        return processor(f"What {cases.VIDEO} is it?", videos=[cases.video(9, 112, 140)])
    if name == "fast video":  # 12 frames at 6 a second: four of them, 1 s a step
        return processor(f"{cases.VIDEO} is?", videos=[cases.video(12, 56, 56)], video_fps=6.0)
    return cases.make(name, processor)


def for_transformers(inputs: dict[str, Any], model: Qwen25VL) -> dict[str, Any]:
    """Positions by the published rule where transformers has another."""
    if "video_grid_thw" not in inputs:
        return inputs
    position_ids = model._position_ids(inputs["input_ids"], Qwen2VLInputs(**inputs))
    return inputs | {"position_ids": position_ids}


@pytest.mark.parametrize(
    "case", ["images", "padded", "text", "video", "fast video", "image_and_video"]
)
def test_logits_loss_and_gradients_match_transformers(
    case: str, model: Qwen25VL, hf_model: Any, processor: Qwen25VLProcessor
) -> None:
    inputs = make(case, processor)
    labels = cases.labels_for(inputs)
    model.zero_grad()
    hf_model.zero_grad()
    ours = model(**inputs, labels=labels)
    theirs = hf_model(**for_transformers(inputs, model), labels=labels)
    ours.loss.backward()
    theirs.loss.backward()
    real = inputs["attention_mask"] == 1
    assert theirs.logits[real].std() > 0.5
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    assert_grads_match(model, hf_model, published_name)


@pytest.mark.parametrize("case", ["images", "padded", "text"])
def test_greedy_tokens_match_transformers(
    case: str, model: Qwen25VL, hf_model: Any, processor: Qwen25VLProcessor
) -> None:
    inputs = make(case, processor)
    expected = hf_model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), expected)


@pytest.mark.parametrize("case", ["padded", "fast video"])
def test_cached_equals_uncached(case: str, model: Qwen25VL, processor: Qwen25VLProcessor) -> None:
    inputs = make(case, processor)
    tokens = torch.full((len(inputs["input_ids"]),), processor.tokenizer.encode("is")[0])
    grown = dict(inputs)
    logits, state = model.prefill(4, **inputs)
    for _ in range(4):
        uncached = model(**grown).logits[:, -1]  # padded on the left: the last place is a token
        torch.testing.assert_close(logits, uncached, rtol=0, atol=1e-4)
        logits = model.decode(tokens, state)
        for name, column in (("input_ids", tokens), ("attention_mask", torch.ones_like(tokens))):
            grown[name] = torch.cat([grown[name], column[:, None]], dim=1)


def test_a_row_does_not_depend_on_its_batch(model: Qwen25VL, processor: Qwen25VLProcessor) -> None:
    batch = make("padded", processor)
    alone = processor(f"{cases.IMAGE}user", [WIDE])
    together = model.generate(**batch, max_new_tokens=6)[2, -6:]
    assert torch.equal(model.generate(**alone, max_new_tokens=6)[0, -6:], together)


def test_windows_are_one_packed_call(
    model: Qwen25VL, processor: Qwen25VLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []
    attend = vision_module.VisionAttention.forward

    def watch(self: Any, x: Any, positions: Any, cu_seqlens: Any, max_seqlen: int) -> Any:
        calls.append(cu_seqlens.diff().tolist())
        assert max(calls[-1]) == max_seqlen
        return attend(self, x, positions, cu_seqlens, max_seqlen)

    monkeypatch.setattr(vision_module.VisionAttention, "forward", watch)
    inputs = make("images", processor)
    model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
    windows = [64, 48, 16, 12, 64, 64]
    assert calls == [windows, [140, 128], windows]


def test_window_order_is_transformers_own() -> None:
    config = transformers.Qwen2_5_VLConfig().vision_config
    grids = [(1, 10, 14), (3, 8, 16), (2, 4, 4), (1, 34, 30)]
    order, lengths = window_order(grids, 2, 4)
    theirs = vision_utils.get_vision_window_index(
        torch.tensor(grids), config.spatial_merge_size, config.window_size, config.patch_size
    )
    assert order.tolist() == torch.as_tensor(theirs[0]).tolist()
    assert torch.tensor([0, *lengths]).cumsum(0).tolist() == theirs[1].tolist()


@pytest.mark.parametrize(
    ("seconds", "times"), [(1.0, [0, 2, 4, 6]), (0.5, [0, 1, 2, 3]), (1.5, [0, 3, 6, 9]),
                           (0.25, [0, 0, 1, 1]), (2 / 3, [0, 1, 2, 4])],
)  # fmt: skip
def test_positions_count_time(
    seconds: float, times: list[int], model: Qwen25VL, processor: Qwen25VLProcessor
) -> None:
    video_id = model.config.video_token_id
    ids = torch.tensor([[100, *[video_id] * 4, 101, 102]])
    inputs = Qwen2VLInputs(
        input_ids=ids,
        video_grid_thw=torch.tensor([[4, 2, 2]]),
        second_per_grid_ts=torch.tensor([seconds]),
    )
    position_ids = model._position_ids(ids, inputs)
    after = 1 + times[-1] + 1
    assert position_ids[0, 0].tolist() == [0, *(1 + t for t in times), after, after + 1]
    assert position_ids[1, 0].tolist() == [0, 1, 1, 1, 1, after, after + 1]


def test_videos_are_sampled_at_two_frames_a_second(processor: Qwen25VLProcessor) -> None:
    video = cases.video(30, 56, 56)
    out = processor(f"{cases.VIDEO}", videos=[video], video_fps=10)
    assert frame_indices(30, 10) == [0, 6, 12, 17, 23, 29]  # qwen-vl-utils: linspace, rounded
    chosen = processor(f"{cases.VIDEO}", videos=[video[[0, 6, 12, 17, 23, 29]]])
    assert torch.equal(out["pixel_values_videos"], chosen["pixel_values_videos"])
    assert out["second_per_grid_ts"].tolist() == [1.0]
    assert len(frame_indices(3, 30)) == 2 and len(frame_indices(100, 30)) == 6
    assert len(frame_indices(10_000, 1)) == 768 and len(frame_indices(20, 60)) == 4
    with pytest.raises(ValueError, match="video_fps: expected a positive number for each of 1"):
        processor(f"{cases.VIDEO}", videos=[video], video_fps=[2.0, 2.0])


def test_pixels_are_bit_equal_to_transformers(
    checkpoint_dir: Path, processor: Qwen25VLProcessor
) -> None:
    theirs = transformers.Qwen2VLImageProcessorPil.from_pretrained(checkpoint_dir)
    images = [WIDE, WHOLE, SMALL]
    expected = theirs(images, return_tensors="pt")
    ours = processor("<|image_pad|>" * 3, images)
    assert torch.equal(ours["pixel_values"], expected["pixel_values"])
    assert torch.equal(ours["image_grid_thw"], expected["image_grid_thw"])


def test_round_trip_through_transformers(
    checkpoint_dir: Path, hf_model: Any, processor: Qwen25VLProcessor, tmp_path: Path
) -> None:
    load(checkpoint_dir).save_pretrained(tmp_path / "ours", max_shard_bytes=60_000)
    ours, theirs = state_of(tmp_path / "ours"), state_of(checkpoint_dir)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.config.to_dict()["vision_config"] == hf_model.config.to_dict()["vision_config"]
    inputs = make("images", processor)
    torch.testing.assert_close(again(**inputs).logits, hf_model(**inputs).logits)


# Qwen/Qwen2.5-VL-7B-Instruct, config.json, with the sparse vision_config of the published file.
PUBLISHED_7B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
    "vision_config": {
        "hidden_size": 1280,
        "in_chans": 3,
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
    },
}


def test_the_published_file_is_the_preset() -> None:
    config = Qwen25VLConfig.from_dict(PUBLISHED_7B)
    assert config == Qwen25VLConfig.preset("7B")
    assert config.vision.tokens_per_second == 2
    assert Qwen25VLConfig.from_dict(config.to_dict()) == config
    theirs = transformers.Qwen2_5_VLConfig(**config.to_dict())
    assert (theirs.vision_config.hidden_size, theirs.vision_config.tokens_per_second) == (1280, 2)
    assert Qwen25VLConfig.from_dict(theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "millions"), [("3B", 3755), ("7B", 8292), ("32B", 33453), ("72B", 73411)]
)
def test_published_sizes_have_the_published_parameters(name: str, millions: int) -> None:
    config = Qwen25VLConfig.preset(name)
    assert round(num_parameters(lambda: Qwen25VL(config)) / 1e6) == millions
    with torch.device("meta"):
        theirs = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(**config.to_dict())
        )
    names = {published_name(name) for name, _ in theirs.named_parameters()}
    assert Qwen25VL.on_meta(config).state_dict().keys() == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_hidden_size": 8}, "vision_config.out_hidden_size: expected hidden_size"),
        ({"window_size": 20}, "vision_config.window_size: expected at least 28, got 20"),
        ({"fullatt_block_indexes": [1.5]}, "fullatt_block_indexes: expected integers"),
        ({"num_heads": 3}, "vision embed_dim: expected a positive multiple"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(change: Any, message: str) -> None:
    vision = PUBLISHED_7B["vision_config"] | change
    with pytest.raises(ValueError, match=message):
        Qwen25VLConfig.from_dict(PUBLISHED_7B | {"vision_config": vision})


def test_seconds_belong_to_videos(model: Qwen25VL, processor: Qwen25VLProcessor) -> None:
    inputs = make("images", processor) | {"second_per_grid_ts": torch.ones(1)}
    with pytest.raises(ValueError, match="second_per_grid_ts: expected one per video, got 1"):
        model(**inputs)


def test_recomputed_and_compiled_gradients_are_the_same(
    checkpoint_dir: Path, processor: Qwen25VLProcessor
) -> None:
    inputs = make("images", processor)
    labels = cases.labels_for(inputs)
    assert_compiles_and_recomputes(
        load(checkpoint_dir),
        lambda run: run(**inputs, labels=labels).loss,
        backend="eager",
        fullgraph=False,  # grids are read on the host
    )


def test_every_backend_computes_the_same_tower(
    backend: Backend, model: Qwen25VL, processor: Qwen25VLProcessor
) -> None:
    inputs = processor(cases.IMAGE, [picture(112, 140)])
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    expected = model.visual(pixels, grid).detach()
    half = copy.deepcopy(model.visual).to(backend.device, torch.bfloat16)
    rows = half(pixels.to(backend.device), grid.to(backend.device)).detach().float().cpu()
    assert (rows - expected).norm() < 0.025 * expected.norm()


def test_a_saved_processor_names_its_class(
    processor: Qwen25VLProcessor, checkpoint_dir: Path, tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    shutil.copy(checkpoint_dir / "config.json", tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2_5_VLProcessor"
    assert isinstance(load_processor(tmp_path), Qwen25VLProcessor)
