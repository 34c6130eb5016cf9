"""What is not supported is an error that names it; what cannot be swapped is left, and said."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

import vlmkernels.patch
from tests.hf_models import SEEN, SIZES, VISION, llava, vit
from tests.patch.cases import CASES, batch, build, losses_and_gradients, state
from vlmkernels.patch import patch_model, unpatch_model
from vlmkernels.patch._model import FAMILIES


def test_each_family_has_its_file() -> None:
    files = {p.stem for p in Path(vlmkernels.patch.__file__).parent.glob("[a-z]*.py")}
    assert files == {family.name for family in FAMILIES.values()}
    assert files == {*CASES, "opt"}


@pytest.mark.parametrize("model", [None, "model", transformers.LlamaForCausalLM])
def test_no_module(model: Any) -> None:
    for function in (patch_model, unpatch_model):
        with pytest.raises(TypeError, match=f"{function.__name__}: model must be a torch.nn"):
            function(model)


def test_unknown_models_are_refused_and_supported_ones_named() -> None:
    bert = transformers.BertModel(transformers.BertConfig(**SIZES))
    for model, name in ((bert, "BertModel"), (torch.nn.Linear(2, 2), "Linear")):
        before = [type(m) for m in model.modules()]
        with pytest.raises(TypeError, match=f"blip_2, clip, llama, .*vit, got .*{name}"):
            patch_model(model)
        assert [type(m) for m in model.modules()] == before


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="norms"):
        patch_model(vit(), norms=False)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="patch_model: norm must be a bool, got 'no'"):
        patch_model(vit(), norm="no")  # type: ignore[arg-type]


class Renamed(modeling_llama.LlamaMLP):
    pass


Renamed.__module__ = modeling_llama.__name__


def renamed(model: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    model.model.layers[1].mlp.__class__ = Renamed
    return "modeling_llama.Renamed is unknown"


def changed_formula(model: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * hidden_states

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    return "LlamaRMSNorm.forward differs from what it was"


def other_rope(model: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    def forward(self: Any, hidden_states: torch.Tensor, **options: Any) -> Any:
        return self.rotate(hidden_states)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    return r"LlamaAttention.forward no longer calls \['apply_rotary_pos_emb'\]"


def other_forward(model: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    model.model.norm.forward = lambda x: x
    return "expected model.model.norm to have the forward of its class"


def other_configs(model: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    del model.config.__dict__["_attn_implementation_internal"]
    return "a config keeps its attn_implementation elsewhere"


CHANGES = [renamed, changed_formula, other_rope, other_forward, other_configs]


@pytest.mark.parametrize("change", CHANGES)
def test_another_transformers_fails_loudly_and_patches_nothing(
    change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlmkernels.patch._swap.subclass.cache_clear()  # as a process would start with it
    model = build("llama")
    message = change(model, monkeypatch)
    before = [(type(m), *sorted(vars(m))) for m in model.modules()]
    with pytest.raises(RuntimeError, match=message + ".*nothing was patched"):
        patch_model(model)
    assert [(type(m), *sorted(vars(m))) for m in model.modules()] == before
    monkeypatch.undo()


def test_a_class_changed_after_patching_is_named() -> None:
    model = build("llama")
    patch_model(model)
    norm = model.model.norm
    norm.__class__ = type("FSDPNorm", (type(norm),), {})
    with pytest.raises(RuntimeError, match="FSDPNorm"):
        unpatch_model(model)


def test_an_unknown_family_within_a_known_one_is_left_and_named() -> None:
    text = {**SIZES, "model_type": "mistral", "num_key_value_heads": 2}
    vision = {**VISION, "model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    model = transformers.LlavaForConditionalGeneration(config)
    before, wanted = state(model.model.language_model), model(**SEEN).loss
    report = patch_model(model)
    assert dict(report.left) == {("MistralModel", "this family is not supported"): 1}
    assert report.replaced["norm", "LayerNorm"] == 6
    assert state(model.model.language_model) == before
    torch.testing.assert_close(model(**SEEN).loss, wanted)


def test_what_cannot_be_swapped_is_left_and_named() -> None:
    config = transformers.LlamaConfig(**SIZES, hidden_act="gelu")
    model = transformers.LlamaForCausalLM(config)
    report = patch_model(model)
    why = "its activation is GELUActivation, not SiLU"
    assert dict(report.left) == {("LlamaMLP", why): 2}
    assert report.replaced["activation", "GELUActivation"] == 2
    assert f"left: 2 LlamaMLP ({why})" in str(report) and "norm: 5 LlamaRMSNorm" in str(report)


def test_derived_classes_are_swapped_unless_their_forward_is_another() -> None:
    model = build("llama")
    wanted = losses_and_gradients(model, batch("llama"))
    first, second = (layer.input_layernorm for layer in model.model.layers)
    norm = type(first)
    first.__class__ = type("FSDPNorm", (norm,), {})
    second.__class__ = type("OwnNorm", (norm,), {"forward": lambda self, x: norm.forward(self, x)})
    before = state(model)
    report = patch_model(model)
    assert dict(report.left) == {("OwnNorm", "its forward is not that of LlamaRMSNorm"): 1}
    assert report.replaced["norm", "LlamaRMSNorm"] == 3
    assert report.replaced["norm", "FSDPNorm"] == 1
    got = losses_and_gradients(model, batch("llama"))
    for key in got:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-3, atol=1e-5)
    unpatch_model(model)
    assert state(model) == before


def test_part_of_a_model_and_a_module_around_one() -> None:
    model = llava()
    assert patch_model(model.model.vision_tower).replaced["norm", "LayerNorm"] == 6
    around = torch.nn.ModuleDict({"model": model})
    replaced = patch_model(around).replaced
    assert replaced["norm", "LlamaRMSNorm"] == 5 and replaced["norm", "LayerNorm"] == 0
    unpatch_model(around)
    assert state(model) == state(llava())


def test_qformer_with_dropout_trains_as_before() -> None:
    model, results = build("blip_2"), []
    for module in model.qformer.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    for patch in (False, True):
        if patch:
            patch_model(model)
        torch.manual_seed(3)
        results.append(losses_and_gradients(model, batch("blip_2")))
    for key in results[0]:
        torch.testing.assert_close(results[1][key], results[0][key], rtol=1e-3, atol=1e-5)


def test_norms_wider_than_their_input_give_its_wider_type() -> None:
    model = build("clip")
    norm = model.vision_model.post_layernorm
    rms = build("llama").model.norm
    x = torch.randn(2, 64).bfloat16()
    wanted = rms(x)
    patch_model(model)
    holder = build("llama")
    patch_model(holder)
    assert torch.equal(holder.model.norm(x), wanted) and wanted.dtype == torch.float32
    assert norm(x.float()).dtype == torch.float32


def test_images_of_another_size() -> None:
    model = build("vit").eval()
    pixels = torch.randn(1, 3, 40, 35)  # columns that do not fill a patch are dropped
    wanted = model(pixels, interpolate_pos_encoding=True).logits
    patch_model(model)
    got = model(pixels, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
