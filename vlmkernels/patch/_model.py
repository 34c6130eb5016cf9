"""patch_model and unpatch_model: from a model to the swaps of its parts, and back."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Module, MultiheadAttention

from vlmkernels.compat import transformers as compat
from vlmkernels.patch import (
    blip_2,
    clip,
    llama,
    llava,
    opt,
    qwen2,
    qwen2_5_vl,
    qwen2_vl,
    siglip,
    vit,
)
from vlmkernels.patch._family import Family
from vlmkernels.patch._modules import OF_ACTIVATIONS, OF_TORCH
from vlmkernels.patch._swap import Swap, changed, original, subclass, swaps_of

_FILES = (blip_2, clip, llama, llava, opt, qwen2, qwen2_5_vl, qwen2_vl, siglip, vit)
FAMILIES = {file.FAMILY.module: file.FAMILY for file in _FILES}
_ACTIVATIONS = "transformers.activations"
_BEFORE = "_attn_implementation_before_patch"


@dataclass(frozen=True)
class Report:
    """What a call did. print(report) is readable.

    replaced: how many objects, by (kind, name of the class); kinds are the options of
        `patch_model`.
    left: how many objects stay as they are though their kind was asked for, by (name of the class,
        reason).
    """

    replaced: Counter[tuple[str, str]] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{kind}: {n} {cls}" for (kind, cls), n in sorted(self.replaced.items())]
        lines += [f"left: {n} {cls} ({why})" for (cls, why), n in sorted(self.left.items())]
        return "\n".join(lines) or "nothing"


def patch_model(
    model: Module,
    *,
    norm: bool = True,
    activation: bool = True,
    rope: bool = True,
    patch_embed: bool = True,
    qformer_attention: bool = True,
    attention: bool = True,
) -> Report:
    """Lets this model of transformers compute with the ops of this package.

    Its Parameters, their names, its hooks and its config (but for attn_implementation) stay what
    they are, so optimizers, checkpoints, save_pretrained and LoRA are not touched; no class or
    module of transformers changes, so other models do not either. What is patched already is left
    alone: a second call replaces nothing. `unpatch_model` is the way back.

    Args:
        model: an instance of a supported class, or a module that holds one (PeftModel, DDP).
        norm: LayerNorm, RMSNorm.
        activation: QuickGELU, GELU, the SwiGLU MLP.
        rope: rotary embedding of text (1-D, M-RoPE) and of patches.
        patch_embed: Conv2d and Conv3d over patches.
        qformer_attention: cross-attention of the Q-Former. In training with dropout of its weights
            transformers' own runs.
        attention: attn_implementation "vlmkernels"; images and windows of Qwen's vision towers in
            one call.

    Returns:
        What was replaced, and what was left though it was asked for.

    Raises:
        TypeError: model is no Module, or its class is not supported (the message says which are);
            an option is no bool.
        RuntimeError: this version of transformers has other classes or forwards than those known,
            or an object's forward has been replaced by something else (hooks of accelerate,
            kernelize). Nothing was patched then.
    """
    options = {
        "norm": norm, "activation": activation, "rope": rope, "patch_embed": patch_embed,
        "qformer_attention": qformer_attention, "attention": attention,
    }  # fmt: skip
    for kind, on in options.items():
        if not isinstance(on, bool):
            raise TypeError(f"patch_model: {kind} must be a bool, got {on!r}")
    wanted = {kind for kind, on in options.items() if on}
    report, plan, models = Report(), list[tuple[Any, type]](), list[Any]()
    for name, module, family in _parts(model):
        if family is None:
            report.left[type(module).__name__, "this family is not supported"] += 1
        elif _is_model(module):
            models.append((module, family))
        else:
            if attention and type(module) is MultiheadAttention:
                report.left["MultiheadAttention", "it is torch's own"] += 1
            plan.append((module, _swapped(module, name, family, wanted, report)))
    if attention:
        _set_attention(models, report)
    for module, cls in plan:
        module.__class__ = cls
    return report


def unpatch_model(model: Module) -> None:
    """Takes back `patch_model`: every object has the class, and every config the
    attn_implementation, that it had before. A model that isn't patched stays as it is.

    Raises:
        RuntimeError: the class of an object was changed again after patching (fully_shard).
    """
    _check_module("unpatch_model", model)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if swaps_of(original(type(module))):
            raise RuntimeError(
                f"unpatch_model: expected classes as patch_model made them, got {type(module)}"
            )
    for module in modules:
        if original(type(module)) is not type(module):
            module.__class__ = original(type(module))
        before = vars(module).pop(_BEFORE, None)
        if before is not None and _implementation(module) == compat.NAME:
            module.config._attn_implementation_internal = before[0]


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _is_model(module: Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _parts(model: Module) -> Iterator[tuple[str, Module, Family | None]]:
    """(name, object, family) of all that belongs to models of known families; a model of an
    unknown family within one of them, with None, in place of what belongs to it."""
    _check_module("patch_model", model)
    found, seen = False, set[int]()

    def walk(name: str, module: Module, family: Family | None, outermost: bool) -> Iterator[Any]:
        nonlocal found
        if id(module) in seen:
            return
        seen.add(id(module))
        around = family
        if _is_model(module):
            family = _family_of(module)
            if family is None and outermost:
                raise _unknown(module)
            found, outermost = True, False
        if around is not None or family is not None:
            yield name, module, family
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}", child, family, outermost)

    yield from walk("model", model, None, True)
    if not found:
        raise _unknown(model)


def _family_of(model: Module) -> Family | None:
    known = (FAMILIES.get(c.__module__) for c in type(model).__mro__)
    return next((family for family in known if family), None)


def _unknown(model: Module) -> TypeError:
    names = ", ".join(sorted(f.name for f in FAMILIES.values()))
    return TypeError(
        f"patch_model: model must be of transformers' families {names}, "
        f"got {type(model).__module__}.{type(model).__name__}"
    )


def _swaps(cls: type, family: Family) -> tuple[Any, tuple[Swap, ...]]:
    """The class that cls is or is derived from (as fully_shard does) for which there are swaps."""
    for base in original(cls).__mro__:
        if base in OF_TORCH:
            return base, (OF_TORCH[base],)
        if base.__module__ == _ACTIVATIONS and base.__name__ in OF_ACTIVATIONS:
            return base, (OF_ACTIVATIONS[base.__name__],)
        if base.__name__ in family.swaps and base.__module__ == family.module:
            return base, family.swaps[base.__name__]
        if base.__module__.startswith("transformers.models."):
            if base.__name__ not in family.others or base.__module__ != family.module:
                raise changed(f"{base.__module__}.{base.__name__} is unknown")
            break
    return cls, ()


def _swapped(module: Module, name: str, family: Family, wanted: set[str], report: Report) -> type:
    """The class that the object is to have."""
    cls: Any = type(module)
    base, swaps = _swaps(cls, family)
    for swap in swaps:
        if swap.kind not in wanted or swap in swaps_of(cls):
            continue
        why = swap.why_not(module, name)
        if original(cls).forward is not base.forward:
            why = f"its forward is not that of {base.__name__}"
        if why is not None:
            report.left[original(cls).__name__, why] += 1
            continue
        _check_forward(module, name)
        cls = subclass(cls, swap)
        report.replaced[swap.kind, cls.__name__] += 1
    return cls  # type: ignore[no-any-return]


def _check_forward(module: Module, name: str) -> None:
    if "forward" in vars(module):
        raise RuntimeError(
            f"patch_model: expected {name} to have the forward of its class, got {module.forward} "
            "(hooks of accelerate's device_map, kernelize): patch before that; nothing was patched"
        )


def _implementation(model: Any) -> str | None:
    return model.config._attn_implementation  # type: ignore[no-any-return]


def _set_attention(models: list[tuple[Any, Family]], report: Report) -> None:
    compat.register()
    if not all(hasattr(model.config, "_attn_implementation_internal") for model, _ in models):
        raise changed("a config keeps its attn_implementation elsewhere")
    for model, family in models:
        name = type(model).__name__
        if name in family.own_attention or _implementation(model) == compat.NAME:
            continue
        setattr(model, _BEFORE, (_implementation(model),))
        model.config._attn_implementation_internal = compat.NAME
        report.replaced["attention", name] += 1
