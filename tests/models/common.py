"""What the tests of all models share: weights that show errors, comparisons, pictures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlmkernels import cli


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough that a wrong sign, scale or forgotten bias shows in the logits."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 0:  # a logit scale stays
                continue
            parameter.normal_(std=0.1)
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(0.0 if name.endswith("bias") else 1.0)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory."""
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def num_parameters(make: Callable[[], torch.nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def assert_grads_match(
    model: torch.nn.Module,
    hf_model: torch.nn.Module,
    own_name: Callable[[str], str] = lambda name: name,
    rtol: float = 1e-3,
) -> None:
    """The gradient of every parameter that transformers gives one, relative to its norm."""
    ours = dict(model.named_parameters())
    compared = 0
    for name, expected in hf_model.named_parameters():
        grad = ours[own_name(name)].grad
        if expected.grad is None or not expected.grad.any():  # not on the way to the loss
            assert grad is None or not grad.any(), name
            continue
        assert grad is not None, name
        norm = float(expected.grad.norm())
        # A key bias shifts all scores of a query alike: its gradient is rounding noise.
        noise = 1e-6 if name.endswith(("k_proj.bias", "key.bias")) else 0.0
        assert float((grad - expected.grad).norm()) <= rtol * norm + noise, name
        compared += 1
    assert compared


def run_command(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `vlmkernels args`."""
    monkeypatch.setattr(sys, "argv", ["vlmkernels", *args])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def ask(
    checkpoint: Path,
    image: Path,
    question: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[int, str, str]:
    """`vlmkernels ask` about a picture that is made at `image`, for five tokens on the CPU."""
    Image.fromarray(picture(40, 50)).save(image)
    args = ["ask", "--model", str(checkpoint), "--image", str(image)]
    args += ["--max-new-tokens", "5", "--device", "cpu", question]
    return run_command(args, monkeypatch, capsys)


def assert_compiles_and_recomputes(
    model: torch.nn.Module,
    loss: Callable[[Callable[..., Any]], torch.Tensor],
    *,
    backend: str = "aot_eager",
    fullgraph: bool = True,
) -> None:
    """loss(model) has the same gradients compiled, and with gradient checkpointing."""
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    grads = []
    for run in (model, compiled, model):
        model.zero_grad()
        loss(run).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        model.gradient_checkpointing_enable(run is compiled)
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, msg=name)


def template_names(templates: str, num_layers: int) -> set[str]:
    """Names, one a line; N stands for every layer, {w,b} for weight and bias."""

    def expand(line: str) -> Iterator[str]:
        for i in range(num_layers if ".N." in line else 1):
            name = line.replace(".N.", f".{i}.")
            if name.endswith(".wb"):
                yield from (name.removesuffix("wb") + leaf for leaf in ("weight", "bias"))
            else:
                yield name

    return {name for line in templates.split() for name in expand(line)}
