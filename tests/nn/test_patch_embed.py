"""PatchEmbed2d, PatchEmbed3d in the place of torch's convolutions and transformers' modules."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmkernels import nn

transformers = pytest.importorskip("transformers")


def tokens(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("kernel_size", "bias"), [*product([4, (4, 6)], [True, False])])
def test_conv2d(kernel_size: int | tuple[int, int], bias: bool) -> None:
    conv = torch.nn.Conv2d(3, 16, kernel_size, stride=kernel_size, bias=bias)
    module = nn.PatchEmbed2d(3, 16, kernel_size, bias=bias)
    assert [*module.state_dict()] == [*conv.state_dict()]
    module.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 13, 14)
    torch.testing.assert_close(module(x), tokens(conv(x)))
    pos_embed = torch.randn(module(x).shape[1:])
    torch.testing.assert_close(module(x, pos_embed), tokens(conv(x)) + pos_embed)


def test_conv3d() -> None:
    conv = torch.nn.Conv3d(3, 16, (2, 4, 4), stride=(2, 4, 4), bias=False)
    module = nn.PatchEmbed3d(3, 16, (2, 4, 4), bias=False)
    conv.load_state_dict(module.state_dict())
    x = torch.randn(2, 3, 5, 8, 12)
    torch.testing.assert_close(module(x), tokens(conv(x)))


def test_stride_is_kernel_size() -> None:
    """Conv2d's fourth positional argument is stride: ours must not take it for bias."""
    assert nn.PatchEmbed2d(3, 16, (4, 6), stride=(4, 6)).kernel_size == (4, 6)
    assert nn.PatchEmbed3d(3, 16, 2, stride=(2, 2, 2)).kernel_size == (2, 2, 2)
    with pytest.raises(ValueError, match=r"d: stride must be kernel_size \(16, 16\), got 8"):
        nn.PatchEmbed2d(3, 16, 16, stride=8)
    with pytest.raises(TypeError, match="positional"):
        nn.PatchEmbed2d(3, 16, 16, 8)


def test_initialised_as_the_convolution() -> None:
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(3, 16, 4, dtype=torch.bfloat16)
    torch.manual_seed(1)
    module = nn.PatchEmbed2d(3, 16, 4, dtype=torch.bfloat16)
    assert torch.equal(module.weight, conv.weight) and torch.equal(module.bias, conv.bias)
    assert nn.PatchEmbed2d(3, 16, 4, device="meta").weight.is_meta


def test_from_conv_shares_parameters() -> None:
    conv = torch.nn.Conv2d(3, 16, 4, stride=4).eval()
    module = nn.PatchEmbed2d.from_conv(conv)
    assert module.weight is conv.weight and module.bias is conv.bias and not module.training
    assert isinstance(module, nn.PatchEmbed2d)
    x = torch.randn(1, 3, 8, 8)
    module(x).sum().backward()
    ours = conv.weight.grad.clone()
    conv.zero_grad()
    conv(x).sum().backward()
    torch.testing.assert_close(ours, conv.weight.grad)
    assert "3, 16, kernel_size=(4, 4), bias=True" in repr(module)


@pytest.mark.parametrize(
    "arguments",
    [{"stride": 2}, {"stride": 4, "padding": 1}, {"stride": 4, "dilation": 2}, {"groups": 3}],
)
def test_from_conv_refuses_other_convolutions(arguments: dict[str, int]) -> None:
    conv = torch.nn.Conv2d(3, 15, 4, **{"stride": 4, **arguments})
    with pytest.raises(ValueError, match=r"conv must have stride == kernel_size, .* got Conv2d\("):
        nn.PatchEmbed2d.from_conv(conv)
    with pytest.raises(TypeError, match="conv must be a Conv3d, got Conv2d"):
        nn.PatchEmbed3d.from_conv(conv)


def test_qwen2_vl() -> None:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

    theirs = PatchEmbed(patch_size=14, temporal_patch_size=2, in_channels=3, embed_dim=32)
    ours = nn.PatchEmbed3d.from_conv(theirs.proj)
    rows = torch.randn(12, 3 * 2 * 14 * 14)
    torch.testing.assert_close(ours(rows), theirs(rows))


def test_vit() -> None:
    from transformers.models.vit.modeling_vit import ViTConfig, ViTEmbeddings

    config = ViTConfig(hidden_size=32, image_size=32, patch_size=8, hidden_dropout_prob=0.0)
    theirs = ViTEmbeddings(config)
    ours = nn.PatchEmbed2d.from_conv(theirs.patch_embeddings.projection)
    x = torch.randn(2, 3, 32, 32)
    got = ours(x, theirs.position_embeddings[0, 1:].contiguous())
    torch.testing.assert_close(got, theirs(x)[:, 1:])


def test_clip() -> None:
    from transformers.models.clip.modeling_clip import CLIPVisionConfig, CLIPVisionEmbeddings

    config = CLIPVisionConfig(hidden_size=32, num_attention_heads=2, image_size=28, patch_size=14)
    theirs = CLIPVisionEmbeddings(config)
    ours = nn.PatchEmbed2d.from_conv(theirs.patch_embedding)
    x = torch.randn(2, 3, 28, 28)
    got = ours(x, theirs.position_embedding.weight[1:])
    torch.testing.assert_close(got, theirs(x)[:, 1:])


def picture(height: int, width: int) -> np.ndarray[Any, Any]:
    """A crop of a photograph."""
    return pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg")[:height, :width]


def test_vit_from_bytes() -> None:
    """uint8 in the place of ViTImageProcessor's normalised floats."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    from transformers.models.vit.modeling_vit import ViTConfig, ViTEmbeddings

    image = picture(64, 64)
    processor = ViTImageProcessorPil(do_resize=False)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    theirs = ViTEmbeddings(ViTConfig(hidden_size=32, image_size=64, hidden_dropout_prob=0.0))
    ours = nn.PatchEmbed2d.from_conv(
        theirs.patch_embeddings.projection, mean=processor.image_mean, std=processor.image_std
    )
    got = ours(torch.tensor(image).permute(2, 0, 1)[None], theirs.position_embeddings[0, 1:])
    torch.testing.assert_close(got, theirs(pixels)[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(pixels), theirs.patch_embeddings(pixels))


def test_clip_from_bytes() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.clip.modeling_clip import CLIPVisionConfig, CLIPVisionEmbeddings

    images = [picture(56, 56), picture(120, 90)[60:116, 20:76]]
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    config = CLIPVisionConfig(hidden_size=32, num_attention_heads=2, image_size=56, patch_size=14)
    theirs = CLIPVisionEmbeddings(config)
    ours = nn.PatchEmbed2d.from_conv(
        theirs.patch_embedding, mean=processor.image_mean, std=processor.image_std
    )
    assert [*ours.state_dict()] == [*theirs.patch_embedding.state_dict()]
    stack = torch.tensor(np.stack(images)).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        ours(stack), tokens(theirs.patch_embedding(pixels)), atol=1e-5, rtol=1e-5
    )


def test_qwen2_vl_from_bytes() -> None:
    """Images of two sizes: the processor's rows through transformers' Conv3d, token for token."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

    images = [picture(56, 84), picture(112, 28)]
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    batch = processor(images, return_tensors="pt")
    theirs = PatchEmbed(patch_size=14, temporal_patch_size=2, in_channels=3, embed_dim=32)
    ours = nn.PatchEmbed3d.from_conv(
        theirs.proj, mean=processor.image_mean, std=processor.image_std, merge_size=2
    )
    want = theirs(batch["pixel_values"])
    pixels = [torch.tensor(image).permute(2, 0, 1) for image in images]
    torch.testing.assert_close(ours(pixels), want, atol=1e-5, rtol=1e-5)
    packed = torch.cat([image.flatten() for image in pixels])
    got = ours(packed, grid_thw=batch["image_grid_thw"])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(batch["pixel_values"]), want)
    normalised = [(x / 255).sub(0.5) for x in pixels]  # floats are taken as they are
    alone = nn.PatchEmbed3d.from_conv(theirs.proj, merge_size=2)
    torch.testing.assert_close(alone(normalised), ours(normalised))
    gradient = torch.autograd.grad(ours(pixels).sum(), ours.weight)[0]
    (expected,) = torch.autograd.grad(theirs(batch["pixel_values"]).sum(), theirs.proj.weight)
    torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-4)


def test_bytes_need_a_normalisation() -> None:
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="PatchEmbed2d: expected mean and std at construction"):
        nn.PatchEmbed2d(3, 16, 4)(pixels)
    with pytest.raises(ValueError, match="PatchEmbed2d: expected mean and std, got only one"):
        nn.PatchEmbed2d(3, 16, 4, mean=[0.5] * 3)
    module = nn.PatchEmbed2d(3, 16, 4, mean=[0.5] * 3, std=[0.5] * 3, merge_size=2)
    assert module(pixels).shape == (1, 4, 16)
    assert "mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), merge_size=2" in repr(module)
