"""What transformers' Trainer asks of a model that is none of its own."""

import copy
import inspect

import pytest
import torch

from vlmkernels import models
from vlmkernels.models.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from vlmkernels.models.vit import ViT, ViTConfig
from vlmkernels.recipes.digits import CHECKPOINT

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
LABELS = torch.tensor([[-100, 2, 3, 4, 5], [-100, -100, -100, -100, 10]])


def test_outputs_read_as_its_tuple() -> None:
    model = models.load(CHECKPOINT)
    out = model(IDS, labels=LABELS)
    assert out[0] is out.loss and out[1:] == (out.logits,)
    assert model(IDS)[0].shape == out.logits.shape
    vit = ViT(ViTConfig(16, 32, 1, 2, num_labels=3, image_size=32))
    classes = vit(torch.randn(1, 3, 32, 32), labels=torch.tensor([1]))
    assert classes[0] is classes.loss and classes[1] is classes.logits
    clip = Clip(
        ClipConfig(
            8,
            vision=ClipVisionConfig(16, 32, 1, 2, image_size=32),
            text=ClipTextConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1),
        )
    )
    pairs = clip(torch.tensor([[1, 49407]]), torch.randn(1, 3, 32, 32), return_loss=True)
    assert pairs[0] is pairs.loss and pairs[3] is pairs.image_embeds


def test_accumulated_batches_weigh_every_label_alike() -> None:
    """It gives num_items_in_batch to models that say so, whatever their forward takes."""
    model = models.load(CHECKPOINT, dtype=torch.float32)
    assert model.accepts_loss_kwargs
    assert "num_items_in_batch" in inspect.signature(model.forward).parameters
    count = LABELS[:, 1:].ne(-100).sum()
    parts = [
        model(IDS[i : i + 1], labels=LABELS[i : i + 1], num_items_in_batch=count).loss
        for i in range(2)
    ]
    torch.testing.assert_close(parts[0] + parts[1], model(IDS, labels=LABELS).loss)


def test_int32_labels() -> None:
    model = models.load(CHECKPOINT)
    expected = model(IDS, labels=LABELS).loss
    assert model(IDS.int(), labels=LABELS.int()).loss == expected


def test_gradient_checkpointing_options() -> None:
    model = models.load(CHECKPOINT, dtype=torch.float32)
    expected = copy.deepcopy(model)
    expected(IDS, labels=LABELS).loss.backward()
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "offload": False}
    model.gradient_checkpointing_enable(**options, every_n_layers=1)
    assert model.model.gradient_checkpointing
    model(IDS, labels=LABELS).loss.backward()
    torch.testing.assert_close(model.head_weight.grad, expected.head_weight.grad)
    with pytest.raises(ValueError, match="every_n_layers: expected none"):
        model.gradient_checkpointing_enable(every_n_layers=2)
    with pytest.raises(ValueError, match="checkpoints: expected none"):
        model.gradient_checkpointing_enable(checkpoints=True)
