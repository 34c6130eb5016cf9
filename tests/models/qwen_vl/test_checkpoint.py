"""Qwen-VL's config and checkpoints: the published ones, in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.common import state_of, template_names
from tests.models.qwen_vl.conftest import DATA, load_model
from vlmkernels.models import MODELS, load, load_processor
from vlmkernels.models.qwen_vl import QwenVisionConfig, QwenVL, QwenVLConfig, QwenVLProcessor
from vlmkernels.models.qwen_vl.weights import own_name, published_name

# Qwen/Qwen-VL-Chat, config.json, without what only its Python files read.
PUBLISHED: dict[str, Any] = {
    "_name_or_path": "./",
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "bfloat16",
    "use_dynamic_ntk": True,
    "use_flash_attn": False,
    "use_logn_attn": True,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
    "vocab_size": 151936,
}
# The names of the published index, model.safetensors.index.json; N stands for every layer.
LANGUAGE_NAMES = """
transformer.wte.weight transformer.ln_f.weight lm_head.weight
transformer.h.N.ln_1.weight transformer.h.N.ln_2.weight
transformer.h.N.attn.c_attn.wb transformer.h.N.attn.c_proj.weight
transformer.h.N.mlp.w1.weight transformer.h.N.mlp.w2.weight transformer.h.N.mlp.c_proj.weight
"""
VISUAL_NAMES = """
conv1.weight positional_embedding ln_pre.wb ln_post.wb proj
transformer.resblocks.N.ln_1.wb transformer.resblocks.N.ln_2.wb
transformer.resblocks.N.attn.in_proj.wb transformer.resblocks.N.attn.out_proj.wb
transformer.resblocks.N.mlp.c_fc.wb transformer.resblocks.N.mlp.c_proj.wb
attn_pool.query attn_pool.pos_embed attn_pool.kv_proj.weight attn_pool.ln_q.wb attn_pool.ln_kv.wb
attn_pool.attn.in_proj_weight attn_pool.attn.in_proj_bias attn_pool.attn.out_proj.wb
"""


def test_the_published_file_is_the_preset() -> None:
    config = QwenVLConfig.from_dict(PUBLISHED)
    assert config == QwenVLConfig.preset("9.6B")
    assert config.to_dict() == PUBLISHED | {"visual": PUBLISHED["visual"] | {"n_queries": 256}}
    assert QwenVLConfig.from_dict(QwenVLConfig.preset("9.6B").to_dict()) == config
    assert MODELS["qwen"].model is QwenVL


def test_published_sizes() -> None:
    model = QwenVL.on_meta(QwenVLConfig.preset("9.6B"))
    names = template_names(LANGUAGE_NAMES, 32)
    names |= {f"transformer.visual.{name}" for name in template_names(VISUAL_NAMES, 48)}
    assert len(names) == 853
    assert model.published_state().keys() == names
    assert sum(p.numel() for p in model.parameters()) == 9_656_935_168
    assert sum(p.numel() for p in model.visual.parameters()) == 1_935_610_624
    assert sum(p.numel() for p in model.visual.attn_pool.parameters()) == 76_054_528


def test_round_trip(tmp_path: Path) -> None:
    load_model().save_pretrained(tmp_path, max_shard_bytes=300_000)
    assert len([*tmp_path.glob("model-*.safetensors")]) > 3
    ours, theirs = state_of(tmp_path), load_file(DATA / "model.safetensors")
    assert ours.keys() == theirs.keys() and "transformer.h.1.attn.c_attn.bias" in ours
    assert all(torch.equal(ours[name], x.float()) for name, x in theirs.items())
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.items() >= json.loads((DATA / "config.json").read_text()).items()
    again = load(tmp_path)
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, load_model()(ids).logits)


@pytest.mark.parametrize("num_files", [1, 3])
def test_published_files_are_of_pytorch(num_files: int, tmp_path: Path) -> None:
    state = load_file(DATA / "model.safetensors")
    names = sorted(state)
    files = {name: f"pytorch_model-{i % num_files}.bin" for i, name in enumerate(names)}
    if num_files == 1:
        files = dict.fromkeys(names, "pytorch_model.bin")
    else:
        index = {"metadata": {"total_size": 1}, "weight_map": files}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for file in {*files.values()}:
        torch.save({n: state[n] for n in names if files[n] == file}, tmp_path / file)
    shutil.copy(DATA / "config.json", tmp_path)
    model = load(tmp_path)
    shutil.rmtree(tmp_path)  # nothing of it is still in the files
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(x, state[name]) for name, x in model.published_state().items())


def test_files_of_older_pytorch_are_read(tmp_path: Path) -> None:
    state, file = load_file(DATA / "model.safetensors"), tmp_path / "pytorch_model.bin"
    shutil.copy(DATA / "config.json", tmp_path)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    published = load(tmp_path).published_state()
    assert all(torch.equal(x, state[name]) for name, x in published.items())
    torch.save(Unexpected(), file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="truncated or not a file of tensors"):
        load(tmp_path)


class Unexpected:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Unexpected(), "pytorch_model.bin: truncated or not a file of tensors"),
        ([torch.ones(3)], "pytorch_model.bin: expected tensors by name"),
        ({"lm_head.weight": 3}, "pytorch_model.bin: expected tensors by name"),
        ({"lm_head.weight": torch.ones(300, 128).int()}, "wrong dtype: lm_head.weight: .*int32"),
    ],
)
def test_pytorch_files_hold_only_tensors(content: Any, message: str, tmp_path: Path) -> None:
    shutil.copy(DATA / "config.json", tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match="truncated or not a file of tensors"):
        load(tmp_path)


def test_names_are_a_bijection() -> None:
    model = load_model()
    for name in model.state_dict():
        assert own_name(published_name(name)) == name
    for constant in ("transformer.rotary_emb.inv_freq", "transformer.h.0.attn.masked_bias"):
        assert own_name(constant) == ""


def test_missing_and_foreign_weights_are_named(tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    state = load_file(DATA / "model.safetensors")
    state["transformer.h.9.ln_1.weight"] = state.pop("transformer.h.1.attn.c_attn.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: .*layers.1.attn.c_attn.bias.*layers.9.ln_1"):
        load(tmp_path)


def test_processors_come_with_the_checkpoint(chat_dir: Path, tmp_path: Path) -> None:
    processor = load_processor(chat_dir)
    assert isinstance(processor, QwenVLProcessor)
    assert (processor.chat_format, processor.max_window_size) == ("chatml", 200)
    assert (processor.image.size, processor.tokenizer.num_slots) == ((28, 28), 16)
    shutil.copytree(chat_dir, tmp_path, dirs_exist_ok=True)
    for name in ("qwen.tiktoken", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="tiktoken, found none"):
        load_processor(tmp_path)
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert (again.chat_format, again.max_window_size) == ("chatml", 200)


@pytest.mark.parametrize("first", ["model", "processor"])
def test_a_chat_that_is_saved_is_a_chat(first: str, chat_dir: Path, tmp_path: Path) -> None:
    """generation_config.json is of both: neither takes away what the other wrote."""
    model, processor = load(chat_dir), load_processor(chat_dir)
    model.generation_config = {"eos_token_id": 7, "top_p": 0.3}
    parts = [model, processor] if first == "model" else [processor, model]
    for part in parts:
        part.save_pretrained(tmp_path / "chat")
    assert load(tmp_path / "chat").generation_config == {
        "eos_token_id": 7,
        "top_p": 0.3,
        "chat_format": "chatml",
        "max_window_size": 200,
    }


def test_a_new_model_has_the_published_positions() -> None:
    config = QwenVLConfig.from_dict(json.loads((DATA / "config.json").read_text()))
    model = QwenVL(config)
    torch.testing.assert_close(
        model.visual.attn_pool.pos_embed, load_model().visual.attn_pool.pos_embed
    )
    assert not model.visual.attn_pool.pos_embed.requires_grad
    assert (model.transformer.ln_f.weight == 1).all() and model.visual.proj.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual": None}, "visual: expected an object .*, got none"),
        ({"visual": 3}, "visual: expected an object, got 3"),
        ({"no_bias": False}, "no_bias: expected True, got False"),
        ({"rotary_pct": 0.5}, "rotary_pct: expected 1.0, got 0.5"),
        ({"attn_dropout_prob": 0.1}, "attn_dropout_prob: expected 0.0, got 0.1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected False, got True"),
        ({"kv_channels": 64}, "kv_channels: expected to give hidden_size 4096, got 2048"),
        ({"hidden_size": 2048}, "hidden_size 2048, got 4096"),
        ({"intermediate_size": 11}, "intermediate_size: expected a multiple of 2, got 11"),
        ({"seq_length": 0}, "seq_length: expected a positive integer, got 0"),
        ({"vocab_size": 151859}, "visual.image_start_id: expected less than .* = 151857"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QwenVLConfig.from_dict(PUBLISHED | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 1660}, "visual.width: expected a multiple of 16, got 1660"),
        ({"output_dim": 100}, "visual.output_dim: expected a multiple of 128, got 100"),
        ({"image_size": 450}, "visual.image_size: expected a multiple of 14, got 450"),
        ({"n_queries": 200}, "visual.n_queries: expected a square, got 200"),
        ({"layers": "48"}, "visual.layers: expected a positive integer, got '48'"),
    ],
)
def test_towers_that_cannot_be_built(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QwenVisionConfig(**change)
