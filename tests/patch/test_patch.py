"""Patched models against the same unpatched: what is swapped, what comes out, the way back."""

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf_models import GRIDS, IDS, LEFT
from tests.patch.cases import CASES, batch, build, losses_and_gradients, state
from vlmkernels import ops
from vlmkernels.patch import patch_model, unpatch_model
from vlmkernels.testing.compare import assert_as_accurate

every_family = pytest.mark.parametrize("name", CASES)
KINDS = ("norm", "activation", "rope", "patch_embed", "qformer_attention", "attention")


@every_family
def test_swaps_what_it_should_and_nothing_of_the_rest(name: str) -> None:
    model, other = build(name), build(name)
    before, tensors = state(model), {k: id(v) for k, v in model.named_parameters()}
    keys = list(model.state_dict())
    report = patch_model(model)
    assert report.replaced == CASES[name].replaced
    assert sum(report.left.values()) == {"blip_2": 3, "siglip": 1}.get(name, 0)
    assert list(model.state_dict()) == keys
    assert {k: id(v) for k, v in model.named_parameters()} == tensors
    assert state(other) == before and state(model) != before
    after = state(model)
    assert patch_model(model).replaced == Counter() and state(model) == after
    unpatch_model(model)
    assert state(model) == before
    unpatch_model(model)
    assert state(model) == before


@every_family
def test_ops_run_as_often_as_objects_were_swapped(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Counter[str]()
    where = {
        **dict.fromkeys(("layer_norm", "rms_norm"), "norm"),
        **dict.fromkeys(("quick_gelu", "gelu", "swiglu"), "activation"),
        **{"rope_from_tables": "rope", "attention": "attention"},
        **{"patch_embed": "patch_embed", "qformer_attention": "qformer_attention"},
    }

    def counting(kind: str, run: Any) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            calls[kind] += 1
            return run(*args, **options)

        return counted

    for op, kind in where.items():
        monkeypatch.setattr(ops, op, counting(kind, getattr(ops, op)))
    model = build(name)
    with torch.no_grad():
        model(**batch(name))
    assert calls == Counter()
    patch_model(model)
    with torch.no_grad():
        model(**batch(name))
    expected = Counter[str]()
    for (kind, _), count in CASES[name].swaps.items():
        expected[kind] += count
    layers = {"clip": 4, "siglip": 4, "blip_2": 4, "llava": 4, "qwen2_vl": 3, "qwen2_5_vl": 4}
    expected["attention"] = layers.get(name, 2)
    expected["norm"] += name == "blip_2"  # its last one a second time, for the pooled token
    assert calls == expected


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_results_and_gradients_are_as_accurate(name: str, dtype: torch.dtype) -> None:
    model, exact = build(name, dtype), build(name, dtype).double()
    same = losses_and_gradients(model, batch(name, dtype))
    theirs = losses_and_gradients(exact, batch(name, torch.float64))
    patch_model(model)
    patch_model(exact)
    got = losses_and_gradients(model, batch(name, dtype))
    wanted = losses_and_gradients(exact, batch(name, torch.float64))
    assert got.keys() == same.keys() == wanted.keys() and len(got) > 20
    for key in got:  # transformers' norms and angles are float32 in float64 too
        torch.testing.assert_close(wanted[key], theirs[key], rtol=1e-4, atol=1e-5)
    scales = {key: x.abs().max().clamp(min=1e-3) for key, x in wanted.items()}
    flat = [torch.cat([(x[k] / s).flatten() for k, s in scales.items()]) for x in (got, same)]
    exactly = torch.cat([(wanted[k] / s).flatten() for k, s in scales.items()])
    assert_as_accurate(name, *flat, exactly)
    unpatch_model(model)
    again = losses_and_gradients(model, batch(name, dtype))
    assert all(torch.equal(again[key], same[key]) for key in same)


def prompt(name: str) -> dict[str, Any]:
    inputs = {k: v for k, v in batch(name).items() if k != "labels"}
    return inputs if "attention_mask" in inputs else inputs | {"attention_mask": None}


@pytest.mark.parametrize("name", ["blip_2", "llama", "qwen2", "llava", "qwen2_vl", "qwen2_5_vl"])
def test_generation_has_the_same_tokens(name: str) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = build(name).eval()
    with torch.no_grad():  # larger weights: the answer depends on what is attended to
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    wanted = model.generate(**prompt(name), **options)
    patch_model(model)
    got = model.generate(**prompt(name), **options)
    assert torch.equal(got, wanted) and len(wanted.unique()) > 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["blip_2", "qwen2_5_vl"])
def test_each_kind_can_be_left_out(name: str, kind: str) -> None:
    model, options = build(name), {kind: False}
    wanted = losses_and_gradients(model, batch(name))
    report = patch_model(model, **options)
    assert report.replaced == {k: n for k, n in CASES[name].replaced.items() if k[0] != kind}
    got = losses_and_gradients(model, batch(name))
    for key in got:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-3, atol=1e-5)
    assert {k for k, _ in patch_model(model).replaced} <= {kind}  # the rest later


@pytest.mark.parametrize("name", ["clip", "qwen2_5_vl"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_patched_and_can_be_unpatched(name: str, copied: Any) -> None:
    model = build(name)
    before = state(model)
    patch_model(model)
    twin = copied(model)
    assert state(twin) == state(model)
    unpatch_model(twin)
    assert state(twin) == before != state(model)


@pytest.mark.parametrize("name", ["clip", "llama", "qwen2_5_vl"])
def test_gradient_checkpointing(name: str) -> None:
    model = build(name)
    patch_model(model)
    wanted = losses_and_gradients(model, batch(name))
    model.gradient_checkpointing_enable()
    got = losses_and_gradients(model, batch(name))
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["vit", "siglip", "llama", "blip_2"])
def test_compiles_in_one_graph(name: str) -> None:
    model = build(name).eval()
    patch_model(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got, wanted = compiled(**batch(name)), model(**batch(name))
    torch.testing.assert_close(got.loss, wanted.loss)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_vision_tower_compiles_with_gradients(name: str) -> None:
    tower = build(name).model.visual
    pixels = batch(name)["pixel_values"]
    patch_model(tower)
    compiled = torch.compile(tower, backend="aot_eager")
    grads = []
    for run in (tower, compiled):
        tower.zero_grad()
        run(pixels, GRIDS).pooler_output.square().sum().backward()
        grads.append([p.grad.clone() for p in tower.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@every_family
def test_autocast(name: str) -> None:
    model = build(name)
    exact = losses_and_gradients(model, batch(name))
    with torch.autocast("cpu", torch.bfloat16):
        same = losses_and_gradients(model, batch(name))
        patch_model(model)
        got = losses_and_gradients(model, batch(name))
    assert_as_accurate("logits", got["logits"], same["logits"], exact["logits"])


class LoRA(torch.nn.Module):
    """A Linear as peft wraps it."""

    def __init__(self, base_layer: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = torch.nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base_layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["clip", "blip_2", "llama", "qwen2_5_vl"])
@pytest.mark.parametrize("patch_first", [True, False])
def test_lora(name: str, patch_first: bool) -> None:
    model = build(name)
    if patch_first:
        patch_model(model)
    projections = ("q_proj", "k_proj", "key", "value", "qkv", "gate_proj", "up_proj", "fc1")
    for path, module in list(model.named_modules()):
        if path.rsplit(".", 1)[-1] in projections:
            parent = model.get_submodule(path.rsplit(".", 1)[0])
            setattr(parent, path.rsplit(".", 1)[-1], LoRA(module))
    if not patch_first:
        assert patch_model(model).replaced == CASES[name].replaced
    got = losses_and_gradients(model, batch(name))
    unpatch_model(model)
    wanted = losses_and_gradients(model, batch(name))
    assert [k for k in got if ".up.weight" in k] and got.keys() == wanted.keys()
    for key in got:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-3, atol=1e-5)


def test_an_optimizer_made_before_still_trains_it() -> None:
    losses: list[list[float]] = []
    for patched in (False, True):
        model = build("llava")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if patched:
            patch_model(model)
        losses.append([])
        for _ in range(3):
            loss = model(**batch("llava")).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][2] < losses[0][0]


@pytest.mark.parametrize("name", ["clip", "qwen2_vl"])
def test_save_pretrained_round_trip(name: str, tmp_path: Path) -> None:
    model = build(name).eval()
    wanted = model(**batch(name)).loss
    patch_model(model)
    model.save_pretrained(tmp_path)
    assert "vlmkernels" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**batch(name)).loss, wanted)
    patch_model(again)
    assert torch.equal(again(**batch(name)).loss, model(**batch(name)).loss)


def test_padding_on_the_left() -> None:
    model = build("llama").eval()
    wanted = model(IDS, attention_mask=LEFT).logits
    patch_model(model)
    got = model(IDS, attention_mask=LEFT).logits
    torch.testing.assert_close(got[LEFT == 1], wanted[LEFT == 1], rtol=1e-4, atol=1e-4)
