"""Checkpoints in and out: every layout that exists, nothing read or written by halves."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models.common import randomize, state_of
from tests.models.qwen2_vl import cases
from tests.models.qwen2_vl.conftest import hf_config, write_tokenizer
from vlmkernels.models import checkpoint, load, load_processor
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor

HfModel = transformers.Qwen2VLForConditionalGeneration


def config_of(path: Path) -> dict[str, Any]:
    """As transformers understands it."""
    return transformers.AutoConfig.from_pretrained(path).to_dict() | {"_name_or_path": ""}


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def broken(checkpoint_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "broken"))


def test_a_new_model_is_saved_in_the_published_flat_layout(
    tmp_path: Path, checkpoint_dir: Path, processor: Qwen2VLProcessor
) -> None:
    config = load(checkpoint_dir).config
    model = Qwen2VL(dataclasses.replace(config, raw={}, tie_word_embeddings=True))
    randomize(model)
    model.save_pretrained(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "config.json").read_text())
    assert saved["hidden_size"] == 64 and "text_config" not in saved
    inputs = cases.make("two_images", processor)
    theirs = HfModel.from_pretrained(tmp_path / "new")(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(load(tmp_path / "new")(**inputs).logits, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
def test_round_trip_through_transformers(
    tied: bool, max_shard_bytes: int, tmp_path: Path, processor: Qwen2VLProcessor
) -> None:
    config = hf_config(write_tokenizer(tmp_path / "tokenizer"))
    config.tie_word_embeddings = tied
    hf_model = HfModel(config)
    randomize(hf_model)
    hf_model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_bytes)
    model = load(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", max_shard_bytes=max_shard_bytes)

    files = len(list((tmp_path / "ours").glob("*.safetensors")))
    assert (files == 1) == (max_shard_bytes == 10**9)
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in (tmp_path / "ours").iterdir())
    theirs, ours = state_of(tmp_path / "theirs"), state_of(tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert ("lm_head.weight" in ours) != tied
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again, report = HfModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    inputs = cases.make("one_image", processor)
    torch.testing.assert_close(model(**inputs).logits, again(**inputs).logits, rtol=0, atol=1e-4)


def test_names_of_newer_transformers_in_memory_are_accepted(
    hf_model: HfModel, model: Qwen2VL, broken: Path
) -> None:
    state = {name: tensor.contiguous() for name, tensor in hf_model.state_dict().items()}
    assert any(name.startswith("model.language_model.") for name in state)
    save_file(state, broken / "model.safetensors")
    assert_same_state(load(broken), model)


def test_a_tied_checkpoint_may_hold_its_head_as_well(model: Qwen2VL, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lm_head.weight: the config ties it"):
        load(broken)
    state = load_file(broken / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, broken / "model.safetensors")
    assert "lm_head.weight" not in load(broken).state_dict()


def test_dtype_is_the_files_unless_asked(broken: Path) -> None:
    state = {k: v.bfloat16() for k, v in load_file(broken / "model.safetensors").items()}
    save_file(state, broken / "model.safetensors")
    assert load(broken).dtype == torch.bfloat16
    assert load(broken, dtype=torch.float32).dtype == torch.float32
    for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=rf"dtype: expected one of .*, got {dtype}"):
            load(broken, dtype=dtype)


@pytest.mark.parametrize("device", ["nope", "cuda:99", 2.5])
def test_device_must_be_there(broken: Path, device: object) -> None:
    with pytest.raises(ValueError, match=rf"device: expected one that is there, got {device!r}"):
        load(broken, device=device)


@pytest.mark.parametrize("model_type", ["gpt", None, ["qwen2_vl"]])
def test_model_type_must_be_known(broken: Path, model_type: object) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    with pytest.raises(ValueError, match=r"expected model_type in \[.*'qwen2_vl'.*\], got"):
        load(broken)


def test_weights_arrive_one_by_one(checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still_meta: list[int] = []
    assign = checkpoint._assign

    def watch(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
        still_meta.append(sum(p.is_meta for p in model.parameters()))
        assign(model, name, tensor)

    monkeypatch.setattr(checkpoint, "_assign", watch)
    count = len(load(checkpoint_dir).state_dict())
    assert still_meta == list(range(count, 0, -1))


def test_a_loaded_model_outlives_its_files(broken: Path, model: Qwen2VL) -> None:
    loaded = load(broken)
    with open(broken / "model.safetensors", "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 100_000)
    assert_same_state(loaded, model)


def test_unknown_config_keys_and_generation_config_survive(broken: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["new_key"], config["text_config"]["new_key"] = [1, {"a": None}], "kept"
    config["vision_config"]["new_key"] = 0.5
    (broken / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [1, 2], "temperature": 0.01, "new_key": True}
    (broken / "generation_config.json").write_text(json.dumps(generation))
    load(broken).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["new_key"] == [1, {"a": None}]
    assert saved["text_config"]["new_key"] == "kept"
    assert saved["vision_config"]["new_key"] == 0.5
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == generation


def test_saving_over_a_checkpoint_replaces_it_and_keeps_other_files(
    broken: Path, model: Qwen2VL
) -> None:
    model.save_pretrained(broken, max_shard_bytes=60_000)
    assert not (broken / "model.safetensors").exists()
    assert_same_state(load(broken), model)
    model.save_pretrained(broken)
    assert [f.name for f in broken.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_state(load(broken), model)
    load_processor(broken)


def test_a_failed_save_changes_nothing(
    broken: Path, model: Qwen2VL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(tensors: Any, file: Path, **kwargs: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    before = {f: f.read_bytes() for f in broken.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    for path in (broken, broken.parent / "new"):
        with pytest.raises(OSError, match="no space"):
            model.save_pretrained(path)
    assert {f: f.read_bytes() for f in broken.iterdir()} == before
    assert list(broken.parent.iterdir()) == [broken]


class Killed(BaseException):
    """Not an Exception: nothing handles the end of a process."""


def kill_after(calls: int, patch: pytest.MonkeyPatch) -> None:
    """Every os.replace and os.unlink after so many calls ends the process."""
    left = iter(range(calls))

    def until_killed(call: Callable[..., None], *args: Any, **options: Any) -> None:
        if next(left, None) is None:
            raise Killed
        call(*args, **options)

    for name in ("replace", "unlink"):
        patch.setattr(os, name, functools.partial(until_killed, getattr(os, name)))


def readable_as(path: Path, models: dict[str, Qwen2VL]) -> str:
    """Which of the models the directory holds, weights and config; "error" when it says so."""
    try:
        found = load(path)
    except ValueError as error:
        if "config.json: expected a file, found none" not in str(error):
            raise
        return "error"
    weights = found.state_dict()
    (name,) = [
        name
        for name, model in models.items()
        if found.config == model.config
        and all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    ]
    return name


@pytest.mark.parametrize("with_config", [True, False], ids=["all", "weights"])
@pytest.mark.parametrize("before", [60_000, 10**9], ids=["shards", "file"])
@pytest.mark.parametrize("after", [60_000, 10**9], ids=["shards", "file"])
def test_a_kill_leaves_the_old_checkpoint_the_new_one_or_an_error(
    before: int, after: int, with_config: bool, tmp_path: Path, model: Qwen2VL
) -> None:
    new = Qwen2VL(dataclasses.replace(model.config, rope_theta=5e5 if with_config else 1e6))
    outcomes = []
    for calls in itertools.count():
        path, killed = tmp_path / str(calls), False
        model.save_pretrained(path, max_shard_bytes=before)
        with pytest.MonkeyPatch.context() as patch:
            kill_after(calls, patch)
            try:
                if with_config:
                    new.save_pretrained(path, max_shard_bytes=after)
                else:
                    checkpoint.save_checkpoint(path, new.state_dict(), {}, max_shard_bytes=after)
            except Killed:
                killed = True
        outcomes.append(readable_as(path, {"old": model, "new": new}))
        if not killed:
            break
    assert set(outcomes) == {"old", "error", "new"}
    assert outcomes == sorted(outcomes, key=["old", "error", "new"].index)


def test_missing_unexpected_and_misshapen_weights_are_all_listed(broken: Path) -> None:
    state = load_file(broken / "model.safetensors")
    del state["visual.blocks.1.attn.qkv.bias"]
    state["model.layers.2.extra"] = torch.zeros(1)
    state["model.norm.weight"] = torch.zeros(63)
    state["visual.merger.ln_q.weight"] = torch.zeros(32, dtype=torch.int8)
    save_file(state, broken / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(broken)
    for part in (
        "missing: visual.blocks.1.attn.qkv.bias",
        "unexpected: model.layers.2.extra",
        "wrong shape: model.norm.weight: expected (64,), got (63,)",
        "visual.merger.ln_q.weight: expected one of ['F16', 'BF16', 'F32', 'F64'], got I8",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 2000, -1])
def test_a_truncated_file_is_named(keep: int, broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        load(broken)


def test_missing_files_are_named(broken: Path, model: Qwen2VL, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint directory"):
        load(tmp_path / "nowhere")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file"):
        load(broken)
    model.save_pretrained(tmp_path / "sharded", max_shard_bytes=60_000)
    shard = next((tmp_path / "sharded").glob("model-00002-*"))
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load(tmp_path / "sharded")
    (broken / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        load(broken)


@pytest.mark.parametrize("model_type", [None, "llama"])
def test_another_model_is_refused_by_name(model_type: str | None, broken: Path) -> None:
    (broken / "config.json").write_text(json.dumps({"model_type": model_type}))
    for read in (load, load_processor):
        with pytest.raises(ValueError, match=r"expected model_type in .*'qwen2_vl'.*, got"):
            read(broken)
