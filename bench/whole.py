"""Whole models against transformers with the very same (random) weights: what they share."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from vlmkernels.models.pretrained import Pretrained
from vlmkernels.models.vlm import VLM

NOTE = "Whole models run with random weights of published sizes."
DECODE_STEPS = 8
Inputs = Mapping[str, Any]
Make = Callable[[Any, Inputs], Callable[[], Any]]


def model_cases(
    op: str, shape: str, models: Mapping[str, Any], inputs: Inputs, steps: Mapping[str, Any]
) -> Iterator[Case]:
    """A case for each of steps: direction -> (tokens that one call takes, what binds the call)."""
    dtype = next(iter(models.values())).dtype
    for direction, (tokens, make) in steps.items():
        yield Case(
            op=op,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            direction=direction,
            bytes=0,
            flops=0,
            variants={variant: make(model, inputs) for variant, model in models.items()},
            tokens=tokens,
            note=NOTE,
        )


def same_weights(
    ours: type[Pretrained], config: Any, theirs: Any, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """variant -> model; all share one set of parameters. theirs: transformers' class.

    Both of transformers' attention kinds are there: the rule of this package's benches is to beat
    the better one.
    """
    torch.manual_seed(0)
    hf_config = theirs.config_class.from_dict(config.to_dict())
    with torch.device(device):
        eager = theirs._from_config(hf_config, attn_implementation="eager").to(dtype).eval()
    shared = {id(p): p for p in eager.parameters()}
    sdpa = copy.deepcopy(eager, shared)
    sdpa.set_attn_implementation("sdpa")
    model = ours.on_meta(config).eval()
    own = {model.own_name(name): x for name, x in eager.state_dict().items()}
    names = model.state_dict().keys()
    model.load_state_dict({name: x for name, x in own.items() if name in names}, assign=True)
    return {"vlmkernels": model, "eager": eager, "transformers SDPA": sdpa}


def train_step(loss: Callable[[Any, Inputs], Tensor], watched: str) -> Make:
    """Loss and gradients of all parameters, without the optimizer, which is PyTorch's in both."""
    return lambda model, inputs: partial(_loss_and_gradients, model, inputs, loss, watched)


def _loss_and_gradients(
    model: Any, inputs: Inputs, loss: Callable[[Any, Inputs], Tensor], watched: str
) -> tuple[Tensor, Tensor]:
    """The loss and one gradient, that of the parameter whose name ends with `watched`."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    value = loss(model, inputs)
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    of = dict(zip(parameters, gradients, strict=True))
    gradient = next(g for name, g in of.items() if name.endswith(watched))
    assert gradient is not None
    return value.detach(), gradient


@torch.inference_mode()
def _prefilled(model: Any, inputs: Inputs) -> tuple[Tensor, Any]:
    if isinstance(model, VLM):
        return model.prefill(DECODE_STEPS + 1, **inputs)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.past_key_values


def prefill(model: Any, inputs: Inputs) -> Callable[[], Tensor]:
    """Logits of the token after the prompt; the KV cache is filled."""
    return lambda: _prefilled(model, inputs)[0]


def decode(model: Any, inputs: Inputs) -> Callable[[], Tensor]:
    """The same few tokens after the prompt, one at a time; logits of the last."""
    ids = inputs["input_ids"]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 1000, (DECODE_STEPS, len(ids)), generator=generator).to(ids.device)
    run = _decode_ours if isinstance(model, VLM) else _decode_theirs
    state: list[Any] = []

    def start_then_run() -> Tensor:
        if not state:  # not at once: the prompt's memory belongs to the variant that runs
            state.append(_prefilled(model, inputs)[1])
        return run(model, inputs, tokens, state[0])

    return start_then_run


@torch.inference_mode()
def _decode_ours(model: Any, inputs: Inputs, tokens: Tensor, state: Any) -> Tensor:
    seqlens, positions = state.cache.seqlens, state.next_positions
    for token in tokens:
        logits = model.decode(token, state)
    state.cache.seqlens, state.next_positions = seqlens, positions
    return logits  # type: ignore[no-any-return]


@torch.inference_mode()
def _decode_theirs(model: Any, inputs: Inputs, tokens: Tensor, cache: Any) -> Tensor:
    batch, length = inputs["input_ids"].shape
    delta = getattr(model.model, "rope_deltas", None)  # of M-RoPE
    for i, token in enumerate(tokens):
        positions = torch.full((batch, 1), length + i, device=token.device)
        if delta is not None:
            positions = (positions + delta).expand(3, -1, -1)
        out = model(
            input_ids=token[:, None],
            past_key_values=cache,
            position_ids=positions,
            use_cache=True,
        )
    cache.crop(-len(tokens))
    return out.logits[:, -1]  # type: ignore[no-any-return]
