"""LLaVA-1.5 against transformers, on checkpoints that transformers wrote."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.conftest import Backend
from tests.models.common import (
    assert_compiles_and_recomputes,
    assert_grads_match,
    num_parameters,
    picture,
    state_of,
)
from tests.models.llava.conftest import write
from vlmkernels.models import load
from vlmkernels.models.generation import stream_text
from vlmkernels.models.llava import Llava, LlavaConfig, LlavaProcessor
from vlmkernels.models.llava.weights import own_name

CAT, DOG = picture(40, 56), picture(64, 33, seed=1)
Inputs = dict[str, Any]


def make(name: str, processor: LlavaProcessor) -> Inputs:
    if name == "one image":
        return processor("USER: <image>\nWhat is in the picture? ASSISTANT:", [CAT])
    if name == "two images":
        return processor("Describe <image> and <image> the two", [CAT, DOG])
    if name == "text":
        return processor("What is in the picture?")
    texts = ["a <image> What? <image> in", "Describe the two images", "<image> dog"]
    return processor(texts, [CAT, DOG, DOG], padding_side=name.removeprefix("padded "))


CASES = ("one image", "two images", "text", "padded left", "padded right")


def labels_for(inputs: Inputs) -> torch.Tensor:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.masked_fill((mask == 0) | (ids == 3), -100)
    labels[torch.arange(len(labels)), mask.argmax(dim=1)] = -100
    return labels


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_match_transformers(
    case: str, model: Llava, hf_model: Any, processor: LlavaProcessor
) -> None:
    inputs = make(case, processor)
    labels = labels_for(inputs)
    model.zero_grad()
    hf_model.zero_grad()
    ours, theirs = model(**inputs, labels=labels), hf_model(**inputs, labels=labels)
    ours.loss.backward()
    theirs.loss.backward()
    real = inputs["attention_mask"] == 1
    assert theirs.logits[real].std() > 0.5
    torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=0, atol=1e-4)
    assert not ours.logits[~real].any()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    assert_grads_match(model, hf_model, own_name)


@pytest.mark.parametrize(
    "options",
    [
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        {"vision_feature_layer": 1, "text": {"num_key_value_heads": 2}},
        {"vision_feature_layer": 2, "multimodal_projector_bias": False},
    ],
    ids=str,
)
def test_the_config_says_which_features(options: dict[str, Any], tmp_path: Path) -> None:
    hf_model = write(tmp_path, **options)
    model = load(tmp_path)
    count = 17 if options.get("vision_feature_select_strategy") == "full" else 16
    ids = torch.tensor([[1, 9, *[3] * count, 10, 11]])
    pixels = torch.randn(1, 3, 32, 32)
    expected = hf_model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(model(ids, pixel_values=pixels).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["one image", "two images", "text", "padded left"])
def test_greedy_tokens_match_transformers(
    case: str, model: Llava, hf_model: Any, processor: LlavaProcessor
) -> None:
    inputs = make(case, processor)
    options = {"max_new_tokens": 6, "eos_token_id": [2]}
    expected = hf_model.generate(**inputs, do_sample=False, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("case", CASES)
def test_cached_equals_uncached(case: str, model: Llava, processor: LlavaProcessor) -> None:
    inputs = make(case, processor)
    grown, last = dict(inputs), [int(m.nonzero()[-1]) for m in inputs["attention_mask"]]
    logits, state = model.prefill(4, **inputs)
    token = torch.full((len(last),), processor.tokenizer.encode("dog")[0])
    for _ in range(4):
        uncached = model(**grown).logits[torch.arange(len(last)), last]
        torch.testing.assert_close(logits, uncached, rtol=0, atol=1e-4)
        logits = model.decode(token, state)
        last = [grown["input_ids"].shape[1]] * len(last)
        for name, column in (("input_ids", token), ("attention_mask", torch.ones_like(token))):
            grown[name] = torch.cat([grown[name], column[:, None]], dim=1)


def test_a_row_does_not_depend_on_its_batch_or_padding_side(
    model: Llava, processor: LlavaProcessor
) -> None:
    sides = [make(f"padded {side}", processor) for side in ("left", "right")]
    new = [model.generate(**x, max_new_tokens=6, eos_token_id=())[:, -6:] for x in sides]
    assert torch.equal(*new)
    alone = processor("<image> dog", [DOG])
    assert torch.equal(
        model.generate(**alone, max_new_tokens=6, eos_token_id=())[0, -6:], new[0][2]
    )


def test_beams_match_transformers(model: Llava, hf_model: Any, processor: LlavaProcessor) -> None:
    # One image a row: of two, transformers 5.17 gives some beams the first one twice.
    inputs = processor(["<image> a dog", "What is in the <image>?"], [CAT, DOG])
    options = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 2}
    expected = hf_model.generate(**inputs, do_sample=False, **options)
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_streamed_text_is_the_decoded_answer(model: Llava, processor: LlavaProcessor) -> None:
    inputs = make("one image", processor)
    options = {"max_new_tokens": 12, "temperature": 2.0, "seed": 0, "eos_token_id": ()}
    pieces = list(stream_text(processor.tokenizer, model.generate_steps(**inputs, **options)))
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    assert "".join(pieces) == processor.tokenizer.decode(ids)


def test_documents_in_a_row_do_not_see_each_other(model: Llava, processor: LlavaProcessor) -> None:
    documents = [processor("a <image> cat", [CAT]), processor("What is in"), processor("the dog")]
    ids = torch.cat([d["input_ids"] for d in documents], dim=1)
    positions = torch.cat([torch.arange(d["input_ids"].shape[1]) for d in documents])[None]
    packed = model(ids, position_ids=positions, pixel_values=documents[0]["pixel_values"]).logits
    separate = torch.cat([model(**d).logits for d in documents], dim=1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="position_ids: expected no documents"):
        model.generate(ids, position_ids=positions, pixel_values=documents[0]["pixel_values"])


def test_gradients_recomputed_and_compiled_are_the_same(
    checkpoint_dir: Path, processor: LlavaProcessor
) -> None:
    model, inputs = load(checkpoint_dir), make("one image", processor)
    labels = labels_for(inputs)
    del inputs["attention_mask"]
    assert_compiles_and_recomputes(model, lambda run: run(**inputs, labels=labels).loss)


def test_every_backend_computes_the_same_model(
    backend: Backend, model: Llava, processor: LlavaProcessor
) -> None:
    inputs = make("one image", processor)
    expected = model(**inputs).logits.detach()
    half = copy.deepcopy(model).to(backend.device, torch.bfloat16)
    inputs = {name: x.to(backend.device) for name, x in inputs.items()}
    logits = half(**inputs).logits.detach().float().cpu()
    assert (logits - expected).norm() < 0.025 * expected.norm()


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {own_name(name): tensor for name, tensor in state.items()}


def test_round_trip_through_transformers(
    checkpoint_dir: Path, hf_model: Any, processor: LlavaProcessor, tmp_path: Path
) -> None:
    load(checkpoint_dir).save_pretrained(tmp_path / "ours", max_shard_bytes=60_000)
    ours, theirs = state_of(tmp_path / "ours"), published(state_of(checkpoint_dir))
    assert ours.keys() == theirs.keys()
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc2.bias" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = make("one image", processor)
    torch.testing.assert_close(again(**inputs).logits, hf_model(**inputs).logits)
    assert again.config.text_config.to_dict() == hf_model.config.text_config.to_dict()


def test_every_layout_of_names_is_read(
    checkpoint_dir: Path, hf_model: Any, model: Llava, tmp_path: Path
) -> None:
    state = {name: tensor.contiguous() for name, tensor in hf_model.state_dict().items()}
    assert any(name.startswith("model.language_model.") for name in state)
    old = dict(model.state_dict()) | {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    for i, layout in enumerate((state, old)):
        path = Path(shutil.copytree(checkpoint_dir, tmp_path / str(i)))
        save_file(layout, path / "model.safetensors")
        loaded = load(path).state_dict()
        assert all(torch.equal(loaded[name], x) for name, x in model.state_dict().items())


# llava-hf/llava-1.5-7b-hf, config.json, as sparse as published.
PUBLISHED_7B: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


def test_the_published_file_is_the_preset() -> None:
    config, preset = LlavaConfig.from_dict(PUBLISHED_7B), LlavaConfig.preset("7B")
    assert (config.pad_token_id, config.eos_token_id) == (32001, 2)
    preset.text.pad_token_id = None  # the published file says it outside
    assert config == preset
    saved = config.to_dict()
    assert {k: saved[k] for k in PUBLISHED_7B if "_config" not in k} == {
        k: v for k, v in PUBLISHED_7B.items() if "_config" not in k
    }
    assert LlavaConfig.from_dict(saved) == config
    theirs = transformers.LlavaConfig(**saved)
    assert theirs.text_config.num_key_value_heads == 32
    assert LlavaConfig.from_dict(theirs.to_dict()).text.hidden_size == 4096


@pytest.mark.parametrize(("name", "parameters"), [("7B", 7_063_427_072), ("13B", 13_351_494_656)])
def test_published_sizes_have_the_published_parameters(name: str, parameters: int) -> None:
    config = LlavaConfig.preset(name)
    assert num_parameters(lambda: Llava(config)) == parameters
    with torch.device("meta"):
        theirs = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(**config.to_dict())
        )
    names = {own_name(name) for name, _ in theirs.named_parameters()}
    assert Llava.on_meta(config).state_dict().keys() == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -26}, "vision_feature_layer: expected one of 25 hidden"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer: expected an integer, got"),
        ({"vision_feature_select_strategy": "cls"}, "select_strategy: expected one of"),
        ({"text_config": {"model_type": "mistral"}}, "model_type: expected llama, got 'mistral'"),
        ({"text_config": {"attention_bias": True}}, "expected no attention_bias"),
        ({"text_config": {"rope_scaling": {"type": "linear"}}}, "rope_scaling: expected none"),
        ({"text_config": {"hidden_size": 100}}, "text_config.hidden_size: expected a multiple"),
        ({"vision_config": {"model_type": "siglip"}}, "expected clip_vision_model, got 'siglip'"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlavaConfig.from_dict(json.loads(json.dumps(PUBLISHED_7B | change)))


def test_wrong_arguments_are_named(model: Llava, processor: LlavaProcessor) -> None:
    inputs = make("one image", processor)
    for change, message in (
        ({"pixel_values": None}, "pixel values: expected for 16 image tokens, got None"),
        ({"pixel_values": torch.zeros(2, 3, 32, 32)}, "expected 32 image tokens .*, got 16"),
        ({"pixel_values": torch.zeros(1, 3, 40, 32)}, "expected images of 32 x 32, got 40 x 32"),
        ({"input_ids": inputs["input_ids"] + 128}, r"input_ids: expected in \[0, 128\)"),
        ({"position_ids": torch.zeros(1, 3)}, "position_ids: expected shape"),
        ({"inputs_embeds": torch.zeros(1, 2, 64)}, "exactly one of input_ids and inputs_embeds"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs | change)
