"""FSDP2 gives a model's own object another class, and its forward gathered weights."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from vlmkernels import models
from vlmkernels.models.blip2 import Blip2OPT, Blip2Pretraining, Blip2Retrieval, Blip2T5
from vlmkernels.models.clip import Clip
from vlmkernels.models.llava import Llava
from vlmkernels.models.opt import OPT
from vlmkernels.models.qwen2_5_vl import Qwen25VL
from vlmkernels.models.qwen2_vl import Qwen2VL
from vlmkernels.models.qwen_vl import QwenVL
from vlmkernels.models.t5 import T5
from vlmkernels.models.vit import ViT
from vlmkernels.recipes.digits import CHECKPOINT

MODELS = [
    *(Blip2OPT, Blip2T5, Blip2Retrieval, Blip2Pretraining, OPT, T5),
    *(Clip, Llava, QwenVL, Qwen2VL, Qwen25VL, ViT),
]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_can_be_sharded(kind: type[nn.Module], alone: None) -> None:
    model = kind.__new__(kind)  # its class is what matters, not its layers
    nn.Module.__init__(model)
    model.weight = nn.Parameter(torch.ones(4))
    assert isinstance(fully_shard(model), FSDPModule)


def test_training_step(alone: None) -> None:
    model = models.load(CHECKPOINT, dtype=torch.float32)
    pictures = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    pad = model.config.image_token_id
    ids = torch.tensor([[1, 2, pad, pad, pad, pad, 7, 8]])
    labels = ids.masked_fill(ids == pad, -100)
    expected = copy.deepcopy(model)
    expected(ids, **pictures, labels=labels).loss.backward()
    for layer in [*model.model.layers, *model.visual.blocks]:
        fully_shard(layer)
    fully_shard(model)
    model(ids, **pictures, labels=labels).loss.backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
