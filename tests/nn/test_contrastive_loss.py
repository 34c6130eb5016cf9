"""nn.ClipLoss and nn.SigLipLoss against open_clip's modules, on one process."""

import importlib.util
import inspect

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench.rivals.contrastive_loss import open_clip_loss
from vlmkernels import nn, ops


def features() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image = normalize(torch.randn(50, 24), dim=-1)
    text = normalize(image + 0.5 * torch.randn(50, 24), dim=-1)
    return image, text, torch.tensor(20.0), torch.tensor(-8.0)


def gradients(module: torch.nn.Module, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = module(*leaves, output_dict=True)["contrastive_loss"]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_open_clip(name: str) -> None:
    """Value, every gradient (also of a logit_bias that cancels), and both signatures."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    peer = getattr(open_clip_loss(), name)
    ours = getattr(nn, name)
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(peer, method)).parameters
        mine = inspect.signature(getattr(ours, method)).parameters
        assert list(mine)[: len(theirs)] == list(theirs)
        for parameter, default in theirs.items():
            assert mine[parameter].default == default.default
    tensors = features()
    for got, want in zip(gradients(ours(), tensors), gradients(peer(), tensors), strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_calls() -> None:
    image, text, scale, bias = features()
    assert torch.equal(nn.ClipLoss()(image, text, scale), ops.clip_loss(image, text, scale))
    assert torch.equal(nn.ClipLoss()(image, text, scale, bias), ops.clip_loss(image, text, scale))
    assert torch.equal(
        nn.SigLipLoss()(image, text, scale, bias), ops.siglip_loss(image, text, scale, bias)
    )
    named = {"image_features": image, "text_features": text, "logit_scale": scale}
    for module in (nn.ClipLoss(), nn.SigLipLoss()):
        assert list(module(**named, logit_bias=None, output_dict=True)) == ["contrastive_loss"]


def test_bad_input() -> None:
    image, text, scale, _ = features()
    with pytest.raises(ValueError, match=r"SigLipLoss: dist_impl must be one of .*, got 'ring'"):
        nn.SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="ClipLoss: use_horovod must be False"):
        nn.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size = 2\), got 2"):
        nn.ClipLoss(rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"world_size = 2 needs torch\.distributed"):
        nn.ClipLoss(world_size=2)(image, text, scale)
    with pytest.raises(TypeError, match="logit_bias"):
        nn.SigLipLoss()(image, text, scale)
