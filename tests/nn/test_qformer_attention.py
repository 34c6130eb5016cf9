"""QFormerCrossAttention against transformers' modules, Resampler against the published code."""

import inspect
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmkernels import nn
from vlmkernels.nn.qformer_attention import interpolated, sincos_positions

transformers = pytest.importorskip("transformers")
DATA = Path(__file__).parents[1] / "data" / "qwen_vl_resampler.safetensors"


def hf_attention(family: str, implementation: str = "eager") -> torch.nn.Module:
    """transformers' cross-attention with its output layer, small; the weights are random."""
    if family == "blip_2":
        from transformers.models.blip_2 import modeling_blip_2 as models

        config_class, module_class = models.Blip2QFormerConfig, models.Blip2QFormerAttention
    else:
        from transformers.models.instructblip import modeling_instructblip as models

        config_class = models.InstructBlipQFormerConfig
        module_class = models.InstructBlipQFormerAttention
    config = config_class(
        hidden_size=48, encoder_hidden_size=88, num_attention_heads=3,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    config._attn_implementation = implementation
    return module_class(config, is_cross_attention=True)


def run(module: torch.nn.Module, *inputs: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """out, then gradients of inputs and parameters; the same dout for every module."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = module(leaves[0], encoder_hidden_states=leaves[1], encoder_attention_mask=mask)
    out = out[0] if isinstance(out, tuple) else out
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, [*leaves, *module.parameters()], dout)]


@pytest.mark.parametrize("form", ["auto", "absorbed", "projected"])
@pytest.mark.parametrize("family", ["blip_2", "instructblip"])
def test_transformers(family: str, form: str) -> None:
    """In place of transformers' module, within its surroundings: values and all gradients."""
    theirs = hf_attention(family)
    queries, tokens = torch.randn(3, 7, 48), torch.randn(3, 20, 88)
    mask = torch.zeros(3, 1, 7, 20)
    mask[1, ..., 12:] = mask[2, ..., 3:9] = torch.finfo(torch.float32).min
    keys = list(theirs.state_dict())
    for m in (None, mask):
        want = run(theirs, queries, tokens, mask=m)
        ours = hf_attention(family)
        ours.load_state_dict(theirs.state_dict())
        ours.attention = nn.QFormerCrossAttention.from_attention(ours.attention)
        ours.attention.form = form
        assert list(ours.state_dict()) == keys
        for got, expected in zip(run(ours, queries, tokens, mask=m), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_own_parameters() -> None:
    """Made anew it has the state_dict of transformers' module, and takes it."""
    theirs = hf_attention("blip_2").attention
    ours = nn.QFormerCrossAttention(48, 88, 3)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict())
    queries, tokens = torch.randn(2, 5, 48), torch.randn(2, 9, 88)
    for got, want in zip(run(ours, queries, tokens), run(theirs, queries, tokens), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_masks() -> None:
    """Integers of a processor, booleans and numbers to add mean the same tokens."""
    ours = nn.QFormerCrossAttention(48, 88, 3)
    queries, tokens = torch.randn(2, 5, 48), torch.randn(2, 9, 88)
    exists = torch.tensor([[1] * 9, [1, 0, 1, 1, 0, 0, 0, 1, 1]])
    four = exists.bool()[:, None, None].expand(2, 1, 5, 9)
    added = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
    want, *_ = run(ours, queries, tokens, mask=exists)
    for mask in (exists.bool(), exists.float(), four, four[:, :, :1], added):
        assert torch.equal(run(ours, queries, tokens, mask=mask)[0], want)
    alone, *_ = run(ours, queries[1:], tokens[1:, exists[1].bool()])
    torch.testing.assert_close(want[1], alone[0])


def test_one_image_for_all_queries() -> None:
    """As BLIP-2's retrieval calls it; and shared queries for all images."""
    theirs = hf_attention("blip_2", "sdpa").attention
    ours = nn.QFormerCrossAttention.from_attention(theirs)
    for batches in ((3, 1), (1, 3)):
        inputs = torch.randn(batches[0], 5, 48), torch.randn(batches[1], 9, 88)
        for got, want in zip(run(ours, *inputs), run(theirs, *inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["blip_2", "instructblip"])
def test_signature(family: str) -> None:
    """Takes what transformers' module takes; and of its options all, as long as they ask for
    nothing."""
    from transformers.utils import TransformersKwargs

    theirs = hf_attention(family).attention
    ours = nn.QFormerCrossAttention.from_attention(theirs)
    parameters = inspect.signature(type(theirs).forward).parameters.values()
    kinds = [(p.name, p.kind, p.default) for p in parameters if p.kind != p.VAR_KEYWORD]
    mine = inspect.signature(type(ours).forward).parameters.values()
    assert [(p.name, p.kind, p.default) for p in mine if p.kind != p.VAR_KEYWORD] == kinds
    queries, tokens = torch.randn(2, 5, 48), torch.randn(2, 9, 88)
    options = dict.fromkeys(TransformersKwargs.__annotations__)
    assert options
    want, _ = ours(queries, encoder_hidden_states=tokens)
    got, weights = ours(queries, encoder_hidden_states=tokens, **options)
    assert torch.equal(got, want) and weights is None
    positional, _ = ours(queries, None, tokens, torch.ones(2, 9))
    torch.testing.assert_close(positional, want)
    options = {"output_attentions": False, "num_items_in_batch": torch.tensor(2)}
    assert torch.equal(ours(queries, encoder_hidden_states=tokens, **options)[0], want)


@pytest.mark.parametrize(
    ("name", "value"),
    [("output_attentions", True), ("is_causal", True), ("cu_seq_lens_k", torch.tensor([0, 9]))],
)
def test_options_that_cannot_be(name: str, value: object) -> None:
    ours = nn.QFormerCrossAttention(48, 88, 3)
    queries, tokens = torch.randn(2, 5, 48), torch.randn(2, 9, 88)
    with pytest.raises(ValueError, match=f"QFormerCrossAttention: {name} must be None: "):
        ours(queries, encoder_hidden_states=tokens, **{name: value})
    with pytest.raises(TypeError, match="unexpected keyword argument 'past_key_value'"):
        ours(queries, encoder_hidden_states=tokens, past_key_value=None)


def test_bad_input() -> None:
    ours = nn.QFormerCrossAttention(48, 88, 3, dropout=0.1)
    queries, tokens = torch.randn(2, 5, 48), torch.randn(2, 9, 88)
    with pytest.raises(ValueError, match=r"dropout must be 0 in training .*, got 0.1"):
        ours(queries, encoder_hidden_states=tokens)
    ours.eval()
    with pytest.raises(ValueError, match="encoder_hidden_states must be given"):
        ours(queries)
    for shape in ((2, 8), (3, 9), (2, 3, 5, 9), (9,)):
        with pytest.raises(ValueError, match=r"encoder_attention_mask must have shape .*, got"):
            ours(queries, None, tokens, torch.ones(shape))
    with pytest.raises(ValueError, match=r"must divide hidden_size \(48\), got 5"):
        nn.QFormerCrossAttention(48, 88, 5)
    with pytest.raises(ValueError, match="widths must be positive and dropout in"):
        nn.QFormerCrossAttention(48, 0, 3)
    with pytest.raises(ValueError, match=r"dropout in \[0, 1\], got 48, 88 and -1"):
        nn.QFormerCrossAttention(48, 88, 3, dropout=-1)
    with pytest.raises(ValueError, match=r"form must be one of .*, got 'fast'"):
        nn.QFormerCrossAttention(48, 88, 3, form="fast")
    for inputs, name in (
        ((queries[..., :47], tokens), "hidden_states must have shape"),
        ((queries[0], tokens), "hidden_states must have shape"),
        ((queries, tokens[..., :80]), "encoder_hidden_states must have shape"),
    ):
        with pytest.raises(ValueError, match=name):
            ours(inputs[0], encoder_hidden_states=inputs[1])
    with pytest.raises(ValueError, match="grid_size and kv_dim must be positive, got 0"):
        nn.Resampler(0, 32, 2)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of 4"):
        nn.Resampler(2, 30, 3)
    with pytest.raises(ValueError, match="a square number of tokens, got 12"):
        nn.Resampler(2, 32, 2)(torch.randn(1, 12, 32))


def test_resampler_golden() -> None:
    """What Qwen-VL's published code computed: `visual` is ln_post and proj of the resampler's
    output for `tokens`, which a vision tower gave."""
    golden = load_file(DATA)
    state = {k.removeprefix("attn_pool."): v for k, v in golden.items() if "attn_pool." in k}
    resampler = nn.Resampler(4, 256, 2, 208)
    torch.testing.assert_close(resampler.pos_embed, state["pos_embed"])
    resampler.load_state_dict(state)
    with torch.no_grad():
        y = resampler(golden["tokens"])
    y = torch.nn.functional.layer_norm(
        y, (256,), golden["ln_post.weight"], golden["ln_post.bias"], 1e-6
    )
    torch.testing.assert_close(y @ golden["proj"], golden["visual"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_dim", [None, 64, 40])
@pytest.mark.parametrize("tokens", [9, 25, 64])
def test_resampler(kv_dim: int | None, tokens: int) -> None:
    """Against torch's own attention: another grid than the queries', with and without kv_proj."""
    ours = nn.Resampler(3, 64, 4, kv_dim)
    assert ("kv_proj.weight" in ours.state_dict()) == (kv_dim == 40)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, tokens, kv_dim or 64, requires_grad=True)
    leaves = [x, *(p for p in ours.parameters() if p.requires_grad)]
    y = ours.ln_kv(ours.kv_proj(x)).transpose(0, 1)
    q = (ours.ln_q(ours.query) + ours.pos_embed)[:, None].expand(-1, 2, -1)
    pos = interpolated(ours.pos_embed, tokens)[:, None]
    want = ours.attn(q, y + pos, y)[0].transpose(0, 1)
    got = ours(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, dout),
        torch.autograd.grad(want, leaves, dout),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_sincos_positions() -> None:
    """The first quarter holds the sines of the column, the third those of the row."""
    positions = sincos_positions(5, 16)
    assert positions.shape == (25, 16)
    row, column = 3, 2
    at = positions[row * 5 + column]
    for i, omega in enumerate((1, 0.1, 0.01, 0.001)):
        for start, place in ((0, column), (8, row)):
            angle = torch.tensor(place * omega)
            torch.testing.assert_close(at[start + i], angle.sin(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(at[start + 4 + i], angle.cos(), rtol=1e-5, atol=1e-6)
