"""Whole answers right or wrong: no credit for part of one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor

from .data import Example

MAX_NEW_TOKENS = 12


@functools.lru_cache(maxsize=256)  # training asks the same few questions over and over
def prompt(processor: Qwen2VLProcessor, question: str) -> str:
    """The chat template around one picture and a question, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}])


def answer_all(
    model: Qwen2VL,
    processor: Qwen2VLProcessor,
    pictures: Sequence[object],
    questions: Sequence[str],
    *,
    batch: int = 75,
) -> Iterator[str]:
    """The model's answer to each question about its picture, through processor and generate."""
    for start in range(0, len(questions), batch):
        part = slice(start, start + batch)
        texts = [prompt(processor, question) for question in questions[part]]
        inputs = processor(texts, list(pictures[part]))
        tokens = generate(model, inputs)
        yield from (processor.tokenizer.decode(row).strip() for row in tokens.tolist())


@torch.inference_mode()
def generate(model: Qwen2VL, inputs: dict[str, Tensor]) -> Tensor:
    """The new tokens only, (batch, num_new) int64, greedily."""
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    tokens: Tensor = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
    return tokens[:, inputs["input_ids"].shape[1] :].cpu()


def accuracy(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """kind -> (whole answers that are exact, questions), with "all" as the last one."""
    score: dict[str, tuple[int, int]] = {}
    for example, given in zip(examples, answers, strict=True):
        for key in (example.kind, "all"):
            right, total = score.get(key, (0, 0))
            score[key] = (right + (given == example.answer), total + 1)
    return score | {"all": score.pop("all")} if score else {}
