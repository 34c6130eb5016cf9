"""MultiheadAttention against torch's: outputs, gradients, state_dict, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmkernels import nn

DIMS: dict[str, Any] = {"embed_dim": 48, "num_heads": 3, "batch_first": True}


def pair(**options: Any) -> tuple[torch.nn.MultiheadAttention, nn.MultiheadAttention]:
    theirs = torch.nn.MultiheadAttention(**DIMS, **options)
    for parameter in theirs.parameters():  # the initial biases are zero: a wrong one would not show
        torch.nn.init.normal_(parameter, std=0.2)
    ours = nn.MultiheadAttention(**DIMS, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same(
    theirs: torch.nn.Module, ours: torch.nn.Module, inputs: tuple[Tensor, ...], **options: Any
) -> None:
    """Outputs, input gradients and parameter gradients agree."""
    dout = torch.randn_like(inputs[0])
    results = []
    for module, mask in ((theirs, {"attn_mask": future(inputs[0])}), (ours, {})):
        leaves = {id(x): x.clone().requires_grad_() for x in inputs}
        extra = mask if options.get("is_causal") else {}
        out, _ = module(*(leaves[id(x)] for x in inputs), need_weights=False, **options, **extra)
        wanted = [*leaves.values(), *module.parameters()]
        results.append([out, *torch.autograd.grad(out, wanted, dout)])
    for ours_, theirs_ in zip(*results, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=2e-5, atol=2e-5)


def future(query: Tensor) -> Tensor:
    return torch.ones(query.shape[-2], query.shape[-2], dtype=torch.bool).triu(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shape", [(2, 7, 48), (7, 48)])
def test_self_attention(bias: bool, is_causal: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert_same(*pair(bias=bias), (x, x, x), is_causal=is_causal)


@pytest.mark.parametrize("dims", [{}, {"kdim": 40, "vdim": 24}])
def test_cross_attention(dims: dict[str, int]) -> None:
    key = torch.randn(2, 9, dims.get("kdim", 48))
    value = torch.randn(2, 9, dims.get("vdim", 48))
    assert_same(*pair(**dims), (torch.randn(2, 5, 48), key, value))


@pytest.mark.parametrize("shape", [(3, 6, 48), (6, 48)])
def test_key_padding_mask(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1]]).bool()
    assert_same(*pair(), (x, x, x), key_padding_mask=mask if x.dim() == 3 else mask[0])


PADDING = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1]]).bool()
MASKS = {
    "bool": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(2)},
    "float": {"attn_mask": torch.randn(6, 6)},
    "every head its own": {"attn_mask": torch.randn(9, 6, 6)},
    "padding, float": {"key_padding_mask": torch.zeros(3, 6).masked_fill(PADDING, -torch.inf)},
    "padding and mask": {"key_padding_mask": PADDING, "attn_mask": torch.eye(6).roll(1, 1).bool()},
    "causal padding": {"key_padding_mask": PADDING, "is_causal": True},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_masks(masks: dict[str, Any]) -> None:
    x = torch.randn(3, 6, 48)
    assert_same(*pair(), (x, x, x), **masks)
    if masks.keys() == {"attn_mask"} and masks["attn_mask"].dim() == 2:
        assert_same(*pair(), (x[0], x[0], x[0]), **masks)


def test_masks_of_nothing() -> None:
    _, ours = pair()
    x = torch.randn(2, 0, 48)
    out, _ = ours(x, x, x, attn_mask=torch.zeros(6, 0, 0), key_padding_mask=torch.zeros(2, 0))
    assert out.shape == x.shape


@pytest.mark.parametrize("training", [True, False])
def test_in_an_encoder_of_torch(training: bool) -> None:
    """Which makes bool masks additive before attention sees them."""
    layer = torch.nn.TransformerEncoderLayer(48, 3, 64, dropout=0.0, batch_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    ours = copy.deepcopy(theirs)
    for block in ours.layers:
        attention = nn.MultiheadAttention(**DIMS)
        attention.load_state_dict(block.self_attn.state_dict())
        block.self_attn = attention.train(training)
    x = torch.randn(3, 6, 48)
    for mask, is_causal in ((None, False), (future(x), True), (future(x), False)):
        options = {"mask": mask, "is_causal": is_causal, "src_key_padding_mask": PADDING}
        valid = ~PADDING
        torch.testing.assert_close(
            ours(x, **options)[valid], theirs(x, **options)[valid], rtol=2e-5, atol=2e-5
        )


def test_padding_is_not_read() -> None:
    _, ours = pair()
    x = torch.randn(2, 6, 48)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:] = True
    poisoned = x.clone()
    poisoned[0, 4:] = torch.nan
    want, _ = ours(x, x, x, key_padding_mask=mask)
    got, _ = ours(x, poisoned, poisoned, key_padding_mask=mask)
    assert torch.equal(got, want)


def test_nothing_but_padding() -> None:
    _, ours = pair()
    x = torch.randn(1, 4, 48)
    out, _ = ours(x, x, x, key_padding_mask=torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(out, ours.out_proj.bias.expand(1, 4, 48))


def test_state_dict_and_initialisation() -> None:
    torch.manual_seed(1)
    theirs = torch.nn.MultiheadAttention(**DIMS, kdim=8)
    torch.manual_seed(1)
    ours = nn.MultiheadAttention(**DIMS, kdim=8)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])


def test_compile() -> None:
    _, ours = pair()
    x = torch.randn(2, 7, 48)
    want, _ = ours(x, x, x, is_causal=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, _ = compiled(x, x, x, is_causal=True)
    torch.testing.assert_close(got, want)


def test_refuses() -> None:
    for options in ({"dropout": 0.1}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match=r"use torch\.nn\.MultiheadAttention"):
            nn.MultiheadAttention(**DIMS, **options)
    with pytest.raises(ValueError, match="batch_first must be True"):
        nn.MultiheadAttention(48, 3)
    _, ours = pair()
    x = torch.randn(2, 6, 48)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    for message, options in {
        r"need_weights .* use torch\.nn": {"need_weights": True},
        r"key_padding_mask must have shape \(2, 6\), got": {"key_padding_mask": mask[:, 1:]},
        r"attn_mask must have shape \(6, 6\) or \(6, 6, 6\), got": {"attn_mask": mask},
    }.items():
        with pytest.raises(ValueError, match=message):
            ours(x, x, x, **options)
    for name in ("attn_mask", "key_padding_mask"):
        with pytest.raises(TypeError, match=f"{name} must be bool or floating point, got .*int64"):
            ours(x, x, x, **{name: mask.long()})
    with pytest.raises(ValueError, match="2 queries and 6 keys"):
        ours(x[:, :2], x, x, is_causal=True)
    with pytest.raises(
        TypeError, match=r"MultiheadAttention: key must be a torch\.Tensor, got list"
    ):
        ours(x, [1.0], x)
