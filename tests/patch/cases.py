"""Each family: a tiny model, a batch, and how many objects of which class must be swapped."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests import hf_models
from tests.hf_models import LABELLED, PAIRS, RAGGED, SEEN, WORDS


@dataclass(frozen=True)
class Case:
    make: Callable[[], Any]
    batch: dict[str, Any]
    swaps: dict[tuple[str, str], int]
    models: tuple[str, ...]  # whose attn_implementation changes

    @property
    def replaced(self) -> Counter[tuple[str, str]]:
        return Counter(self.swaps) + Counter({("attention", name): 1 for name in self.models})


def decoder(name: str, mlp: str) -> dict[tuple[str, str], int]:
    swaps = {("norm", f"{name}RMSNorm"): 5, ("rope", f"{name}Attention"): 2}
    return swaps | {("activation", mlp): 2}


PATCHES = {("patch_embed", "Conv2d"): 1}
CASES = {
    "vit": Case(
        hf_models.vit,
        LABELLED,
        {("norm", "LayerNorm"): 5, ("activation", "GELUActivation"): 2, **PATCHES},
        ("ViTForImageClassification",),
    ),
    "clip": Case(
        hf_models.clip,
        PAIRS,
        {("norm", "LayerNorm"): 11, ("activation", "QuickGELUActivation"): 4, **PATCHES},
        ("CLIPModel", "CLIPTextModel", "CLIPVisionModel"),
    ),
    "siglip": Case(
        hf_models.siglip,
        PAIRS,
        {("norm", "LayerNorm"): 11, ("activation", "GELUTanh"): 5, **PATCHES},
        ("SiglipModel", "SiglipTextModel", "SiglipVisionModel"),
    ),
    "blip_2": Case(
        hf_models.blip_2,
        SEEN,
        {
            ("norm", "LayerNorm"): 19,
            ("activation", "GELUActivation"): 5,
            ("qformer_attention", "Blip2QFormerMultiHeadAttention"): 2,
            **PATCHES,
        },
        ("Blip2ForConditionalGeneration", "Blip2VisionModel", "OPTForCausalLM"),
    ),
    "llama": Case(hf_models.llama, WORDS, decoder("Llama", "LlamaMLP"), ("LlamaForCausalLM",)),
    "qwen2": Case(hf_models.qwen2, WORDS, decoder("Qwen2", "Qwen2MLP"), ("Qwen2ForCausalLM",)),
    "llava": Case(
        hf_models.llava,
        SEEN,
        {
            **decoder("Llama", "LlamaMLP"),
            ("norm", "LayerNorm"): 6,
            ("activation", "QuickGELUActivation"): 2,
            ("activation", "GELUActivation"): 1,
            **PATCHES,
        },
        ("LlavaForConditionalGeneration", "CLIPVisionModel", "LlamaModel"),
    ),
    "qwen2_vl": Case(
        hf_models.qwen2_vl,
        RAGGED,
        {
            **decoder("Qwen2VL", "Qwen2MLP"),
            ("norm", "LayerNorm"): 3,
            ("activation", "QuickGELUActivation"): 1,
            ("activation", "GELU"): 1,
            ("rope", "VisionAttention"): 1,
            ("attention", "VisionAttention"): 1,
            ("patch_embed", "Conv3d"): 1,
        },
        (
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLTextModel",
            "Qwen2VisionTransformerPretrainedModel",
        ),
    ),
    "qwen2_5_vl": Case(
        hf_models.qwen2_5_vl,
        RAGGED,
        {
            **decoder("Qwen2_5_VL", "Qwen2MLP"),
            ("norm", "Qwen2_5_VLRMSNorm"): 10,
            ("activation", "Qwen2_5_VLMLP"): 2,
            ("activation", "GELU"): 1,
            ("rope", "Qwen2_5_VLVisionAttention"): 2,
            ("attention", "Qwen2_5_VLVisionAttention"): 2,
            ("patch_embed", "Conv3d"): 1,
        },
        (
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLTextModel",
            "Qwen2_5_VisionTransformerPretrainedModel",
        ),
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Norms and biases random too, so that none may be forgotten; no dropout."""
    torch.manual_seed(0)
    model = CASES[name].make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).train()


def batch(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    given = CASES[name].batch
    pixels = {"pixel_values": given["pixel_values"].to(dtype)} if "pixel_values" in given else {}
    return given | pixels


def losses_and_gradients(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    logits = out.logits_per_image if "logits_per_image" in out else out.logits
    return {"loss": out.loss.detach(), "logits": logits.detach(), **named}


def state(model: Any) -> list[Any]:
    """All that patching may change, and unpatching must give back."""
    configs = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    return [[(type(m), *sorted(vars(m))) for m in model.modules()], configs]
