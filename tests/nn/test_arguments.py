"""What modules refuse at construction: a wrong argument is no error of some later call."""

from typing import Any

import numpy as np
import pytest
import torch

from vlmkernels import nn

# Valid arguments, and values that a hint or the formula rules out.
WRONG_TYPES: list[tuple[str, dict[str, Any], str, Any]] = [
    ("GELU", {}, "approximate", None),
    ("GEGLU", {}, "approximate", 1),
    ("RotaryEmbedding", {}, "theta", "1e4"),
    ("RotaryEmbedding", {}, "rotary_dim", 64.0),
    ("MRotaryEmbedding", {"sections": [16, 24, 24]}, "sections", 3),
    ("MRotaryEmbedding", {"sections": [16, 24, 24]}, "interleaved", "no"),
    ("VisionRotaryEmbedding", {}, "theta", np.ones(2)),
    ("QKNormRotaryEmbedding", {"head_dim": 128}, "head_dim", "128"),
    ("QKNormRotaryEmbedding", {"head_dim": 128}, "eps", None),
    ("RMSNorm", {"dim": 8}, "eps", "1e-6"),
    ("LayerNorm", {"normalized_shape": 8}, "elementwise_affine", 1),
    ("LayerNorm", {"normalized_shape": 8}, "bias", "False"),
    ("SwiGLUMLP", {"hidden_dim": 8, "mlp_dim": 8}, "mlp_dim", 8.0),
    ("SwiGLUMLP", {"hidden_dim": 8, "mlp_dim": 8}, "hidden_dim", True),
    ("ClipLoss", {}, "local_loss", "no"),
    ("ClipLoss", {}, "rank", "0"),
    ("SigLipLoss", {}, "world_size", None),
    ("MultiheadAttention", {"embed_dim": 16, "num_heads": 2}, "batch_first", "no"),
    ("PatchEmbed2d", {"in_channels": 3, "out_channels": 8, "kernel_size": 4}, "bias", "no"),
    ("Resampler", {"grid_size": 2, "embed_dim": 16, "num_heads": 2}, "grid_size", 2.0),
    ("VectorQuantizer", {"n_e": 4, "e_dim": 8}, "legacy", "no"),
    ("VectorQuantize", {"dim": 8, "codebook_size": 4}, "rotation_trick", "no"),
]
WRONG_VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("GELU", {"approximate": "erf"}, "approximate must be 'none' or 'tanh', got 'erf'"),
    ("GEGLU", {"approximate": "erf"}, "approximate must be 'none' or 'tanh', got 'erf'"),
    ("RotaryEmbedding", {"theta": 0.0}, "theta must be finite and above 0, got 0.0"),
    ("RotaryEmbedding", {"rotary_dim": 63}, "rotary_dim must be even and in 2..256, got 63"),
    ("MRotaryEmbedding", {"sections": [16, 48]}, "sections must be three ints"),
    ("MRotaryEmbedding", {"sections": [16, 24, -8]}, "sections must be non-negative"),
    ("MRotaryEmbedding", {"sections": [8, 8, 8], "rotary_dim": 64}, "sections must .* = 32"),
    ("VisionRotaryEmbedding", {"theta": float("nan")}, "theta must be finite"),
    ("QKNormRotaryEmbedding", {"head_dim": 8, "interleaved": True}, "interleaved needs sections"),
    ("QKNormRotaryEmbedding", {"head_dim": 8, "theta": -1.0}, "theta must be finite and above 0"),
    ("SwiGLUMLP", {"hidden_dim": 8, "mlp_dim": -1}, "mlp_dim must be positive, got -1"),
    (
        "MultiheadAttention",
        {"embed_dim": 16, "num_heads": 3, "batch_first": True},
        "embed_dim must be a multiple of num_heads 3, got 16",
    ),
    (
        "PatchEmbed2d",
        {"in_channels": -1, "out_channels": 8, "kernel_size": 4},
        "in_channels must be positive, got -1",
    ),
]


@pytest.mark.parametrize(("name", "valid", "argument", "wrong"), WRONG_TYPES)
def test_wrong_types(name: str, valid: dict[str, Any], argument: str, wrong: Any) -> None:
    module = getattr(nn, name)
    module(**valid, **({"batch_first": True} if name == "MultiheadAttention" else {}))
    with pytest.raises(TypeError, match=f"^{name}: {argument} must be of type .*, got "):
        module(**{**valid, argument: wrong})


@pytest.mark.parametrize(("name", "arguments", "message"), WRONG_VALUES)
def test_wrong_values(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        getattr(nn, name)(**arguments)


def test_interleaved_sections_of_qwen3_vl() -> None:
    module = nn.MRotaryEmbedding([24, 20, 20], interleaved=True, theta=5e6)
    assert module.sections == (24, 20, 20)


def test_inputs_are_floating_point() -> None:
    codes = nn.VectorQuantizer(4, 8)
    with pytest.raises(TypeError, match=r"^VectorQuantizer: z must be floating point"):
        codes(torch.ones(1, 8, 2, 2, dtype=torch.int64))


INPUTS: list[tuple[torch.nn.Module, list[Any], int, str]] = [
    (nn.MultiheadAttention(16, 2, batch_first=True), [torch.ones(1, 4, 16)] * 3, 0, "query"),
    (nn.MultiheadAttention(16, 2, batch_first=True), [torch.ones(1, 4, 16)] * 3, 2, "value"),
    (nn.Resampler(2, 16, 2, 24), [torch.ones(1, 4, 24)], 0, "x"),
    (nn.QFormerCrossAttention(16, 24, 2), [*[torch.ones(1, 4, 16)], None, torch.ones(1, 4, 24)],
     2, "encoder_hidden_states"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "inputs", "place", "name"), INPUTS)
def test_inputs(module: torch.nn.Module, inputs: list[Any], place: int, name: str) -> None:
    module(*inputs)
    prefix = f"^{type(module).__name__}: {name} must "
    for wrong in (inputs[place].numpy(), inputs[place].int(), "x"):
        with pytest.raises(TypeError, match=prefix):
            module(*inputs[:place], wrong, *inputs[place + 1 :])
    for wrong in (inputs[place][..., :-1], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=prefix):
            module(*inputs[:place], wrong, *inputs[place + 1 :])


def test_masks_are_tensors() -> None:
    x = torch.ones(1, 4, 16)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    for name in ("key_padding_mask", "attn_mask"):
        with pytest.raises(TypeError, match=f"^MultiheadAttention: {name} must be a torch.Tensor"):
            attention(x, x, x, **{name: np.zeros((4, 4), bool)})
    with pytest.raises(TypeError, match=r"^QFormerCrossAttention: encoder_attention_mask must be"):
        nn.QFormerCrossAttention(16, 16, 2)(x, None, x, [[True] * 4])
    with pytest.raises(ValueError, match=r"^MultiheadAttention: key must have shape"):
        attention(x, x[0], x)


def test_x_is_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"^SwiGLUMLP: x must be floating point, got torch.int64"):
        nn.SwiGLUMLP(16, 8)(torch.ones(4, 16, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"^PatchEmbed2d: x must be a torch.Tensor or a sequence"):
        nn.PatchEmbed2d(3, 8, 4)(None)  # type: ignore[arg-type]
