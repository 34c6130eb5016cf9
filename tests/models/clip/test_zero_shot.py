"""Classification: weights by hand, the command line, real pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.models.common import picture, run_command
from vlmkernels.models import MODELS, load, load_processor
from vlmkernels.models.classify import classify
from vlmkernels.models.clip import ZeroShotClassifier

LABELS = ["cat", "dog", "red car"]


def test_probabilities_are_those_of_transformers(checkpoint_dir: Path, hf_model: Any) -> None:
    classifier = ZeroShotClassifier(load(checkpoint_dir), load_processor(checkpoint_dir), LABELS)
    images = [picture(40, 50), picture(64, 33, seed=1)]
    inputs = load_processor(checkpoint_dir)([f"a photo of a {x}." for x in LABELS], images)
    expected = hf_model(**inputs).logits_per_image.softmax(dim=1)
    torch.testing.assert_close(classifier(images), expected, rtol=0, atol=1e-5)


def test_several_prompts_are_averaged_on_the_sphere(checkpoint_dir: Path) -> None:
    model, processor = load(checkpoint_dir), load_processor(checkpoint_dir)
    templates = ["a {}", "the {}.", "a photo of the {}"]
    weight = ZeroShotClassifier(model, processor, LABELS, templates).weight
    for i, label in enumerate(LABELS):
        each = [model.encode_text(**processor(t.format(label)))[0] for t in templates]
        mean = torch.stack(each).mean(dim=0)
        torch.testing.assert_close(weight[i], mean / mean.norm())
    for labels, wrong in (([], ["a {}"]), (LABELS, []), (LABELS, ["a photo"])):
        with pytest.raises(ValueError, match="expected"):
            ZeroShotClassifier(model, processor, labels, wrong)


def test_real_pictures_give_probabilities(checkpoint_dir: Path) -> None:
    pictures = pytest.importorskip("sklearn.datasets").load_sample_images().images
    rankings = classify(load(checkpoint_dir), load_processor(checkpoint_dir), pictures, LABELS)
    for ranking in rankings:
        names, values = zip(*ranking, strict=True)
        assert sorted(names) == sorted(LABELS)
        assert list(values) == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)


def test_classify_on_the_command_line(
    checkpoint_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i in range(2):
        Image.fromarray(picture(40, 50, seed=i)).save(tmp_path / f"{i}.png")
    images = [str(tmp_path / f"{i}.png") for i in range(2)]
    args = ["classify", "--model", str(checkpoint_dir), "--device", "cpu"]
    code, out, err = run_command(
        [*args, "--image", images[0], "--labels", "cat, dog,red car", "--top", "2"],
        monkeypatch,
        capsys,
    )
    (ranking,) = classify(load(checkpoint_dir), load_processor(checkpoint_dir), images[0], LABELS)
    assert (code, err) == (0, "")
    assert out.splitlines() == [f"{p:7.2%}  {name}" for name, p in ranking[:2]]
    both = [*args, "--image", images[0], "--image", images[1], "--labels", "cat"]
    code, out, _ = run_command(both, monkeypatch, capsys)
    assert code == 0 and out.splitlines() == [images[0], "100.00%  cat", images[1], "100.00%  cat"]
    code, out, err = run_command([*args, "--image", images[0]], monkeypatch, capsys)
    assert (code, out) == (2, "") and "labels: expected at least one label" in err


def test_what_does_not_answer_in_text_is_not_asked(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["ask", "--model", str(checkpoint_dir), "--device", "cpu", "What is it?"]
    code, out, err = run_command(args, monkeypatch, capsys)
    assert (code, out) == (2, "") and "model: expected one that answers in text" in err


def test_every_model_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_command(["models"], monkeypatch, capsys)
    assert code == 0
    assert [line.split("  ")[0] for line in out.splitlines()[1:]] == [
        entry.title for entry in MODELS.values()
    ]
    assert "B/32, B/16, L/14, L/14-336, H/14, bigG/14" in out


def test_a_vit_classifies_by_its_own_labels(tmp_path: Path) -> None:
    sizes = {"image_size": 32, "patch_size": 16, "num_hidden_layers": 1, "intermediate_size": 8}
    names = {0: "tench", 1: "goldfish"}
    config = transformers.ViTConfig(hidden_size=16, num_attention_heads=2, id2label=names, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model, processor = load(tmp_path), load_processor(tmp_path)
    (ranking,) = classify(model, processor, np.zeros((9, 9, 3), np.uint8))
    assert sorted(name for name, _ in ranking) == ["goldfish", "tench"]
    with pytest.raises(ValueError, match="labels: expected none for a ViT"):
        classify(model, processor, picture(9, 9), ["cat"])
    with pytest.raises(ValueError, match="model: expected a CLIP or a ViT"):
        classify(object(), processor, picture(9, 9))
