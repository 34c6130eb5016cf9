"""stop_strings and max_length: rows end where those of transformers end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.stopping_criteria import StopStringCriteria

from tests.models import test_t5
from tests.models.qwen2_vl import cases
from vlmkernels.models.chat import Chat
from vlmkernels.models.generation import stream_text
from vlmkernels.models.qwen2_vl import Qwen2VL, Qwen2VLProcessor
from vlmkernels.models.stopping import StopStrings
from vlmkernels.models.t5 import T5

NEW = 12


@pytest.fixture(scope="module")
def hf_tokenizer(checkpoint_dir: Path) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint_dir / "tokenizer.json")
    )


def answers(model: Qwen2VL, inputs: dict[str, Any]) -> list[list[int]]:
    free = model.generate(**inputs, max_new_tokens=NEW, eos_token_id=())
    return free[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=str)
def test_rows_end_where_transformers_ends_them(
    search: dict[str, int],
    model: Qwen2VL,
    hf_model: transformers.Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
    hf_tokenizer: Any,
) -> None:
    inputs = cases.make("padded_left", processor)
    # Without an end token transformers goes on with rows that have ended.
    options = {"max_new_tokens": NEW, "pad_token_id": 5, "eos_token_id": 7} | search
    free = model.generate(**inputs, **options)
    early = 0
    for stops in (" t", [" t", "*"], ["<|video_pad|>", "@@@@"], ["y", "urect"], ["re"]):
        ours = model.generate(
            **inputs, **options, stop_strings=stops, tokenizer=processor.tokenizer
        )
        expected = hf_model.generate(
            **inputs, **options, stop_strings=stops, tokenizer=hf_tokenizer, do_sample=False
        )
        assert ours.tolist() == expected.tolist()
        early += ours.shape != free.shape or not torch.equal(ours, free)
    assert early > 1


def test_texts_end_where_transformers_ends_them(
    processor: Qwen2VLProcessor, hf_tokenizer: Any
) -> None:
    """Every prefix of a text, cut into letters, into words and into what training made of it."""
    text = "What is in the picture? Describe the two images in the pictures"
    encode = processor.tokenizer.encode
    for pieces in (text, text.split(" "), [text]):
        ids = [i for piece in pieces for i in encode(piece)]
        for stops in (["the"], ["pict"], ["ures", "s i"], ["t", "zzz"], ["in the"], ["e t"]):
            theirs = StopStringCriteria(hf_tokenizer, stops)
            for n in range(1, len(ids)):
                ours = StopStrings(stops, processor.tokenizer, torch.tensor([ids[:n]]), None)
                whole = torch.tensor([ids[: n + 1]])
                assert ours.hit(whole[:, n:]) == theirs(whole, None).tolist(), (stops, ids[: n + 1])


def test_the_others_go_on(model: Qwen2VL, processor: Qwen2VLProcessor) -> None:
    inputs = cases.make("padded_left", processor)
    first, *others = answers(model, inputs)
    place = next(i for i, token in enumerate(first) if all(token not in x for x in others))
    stop = processor.tokenizer.decode(first[: place + 1], skip_special_tokens=False)
    out = model.generate(
        **inputs, max_new_tokens=NEW, eos_token_id=(), pad_token_id=5, stop_strings=stop,
        tokenizer=processor.tokenizer,
    )  # fmt: skip
    new = out[:, -NEW:].tolist()
    assert new == [first[: place + 1] + [5] * (NEW - place - 1), *others]


def hits(processor: Qwen2VLProcessor, prompt: str, new: str, *stops: str) -> list[bool]:
    encode = processor.tokenizer.encode
    ids = [[i for c in text for i in encode(c)] for text in (prompt, new)]
    mask = torch.tensor([[0] + [1] * len(ids[0])])
    stopping = StopStrings(stops, processor.tokenizer, torch.tensor([[5, *ids[0]]]), mask)
    return [any(stopping.hit(torch.tensor([ids[1][: n + 1]]))) for n in range(len(ids[1]))]


def test_only_the_last_token_ends_a_row(processor: Qwen2VLProcessor) -> None:
    assert hits(processor, "x", "stop it", "stop") == [False] * 3 + [True] + [False] * 3
    assert hits(processor, "ST", "OP!", "STOP", "?") == [False, True, False]  # begun in the prompt
    assert hits(processor, "STOP", "?!", "STOP") == [False, False]
    # Three tokens to a character: it is there with the last of its bytes.
    assert hits(processor, "x", "a\u20ac!", "\u20ac") == [False, False, False, True, False]


def test_special_tokens_are_text(processor: Qwen2VLProcessor) -> None:
    end = processor.tokenizer.encode("<|im_end|>")
    stopping = StopStrings("<|im_end|>", processor.tokenizer, torch.tensor([[1]]), None)
    assert len(end) == 1 and stopping.hit(torch.tensor([end])) == [True]


def test_streams_and_chats_end_too(model: Qwen2VL, processor: Qwen2VLProcessor) -> None:
    inputs = cases.make("text", processor)
    options = {"max_new_tokens": 40, "temperature": 3.0, "seed": 0, "eos_token_id": ()}
    stream = lambda **more: "".join(  # noqa: E731
        stream_text(processor.tokenizer, model.generate_steps(**inputs, **options, **more))
    )
    text = stream()
    stop = text[9:11]
    text = stream(stop_strings=stop, tokenizer=processor.tokenizer)
    assert stop in text and len(text) < len(stream())
    said = Chat(model, processor).ask("a", **options)
    stop = said[9:11]
    assert stop in (short := Chat(model, processor).ask("a", **options, stop_strings=[stop]))
    assert said.startswith(short) and len(short) < len(said)


def test_max_length_counts_the_prompt(
    model: Qwen2VL,
    hf_model: transformers.Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
    tmp_path: Path,
) -> None:
    inputs = cases.make("padded_left", processor)
    longest = inputs["input_ids"].shape[1] + 3
    out = model.generate(**inputs, max_length=longest)
    assert out.shape[1] == longest
    expected = hf_model.generate(**inputs, max_length=longest, do_sample=False)
    assert torch.equal(out, expected)
    assert torch.equal(model.generate(**inputs, max_length=9, max_new_tokens=3), out)
    with pytest.raises(
        ValueError, match=f"max_length: expected more than the prompt's {longest - 3} tok"
    ):
        model.generate(**inputs, max_length=longest - 3)
    test_t5.write(tmp_path, "flan")
    assert T5.from_pretrained(tmp_path).generate(test_t5.IDS, max_length=4).shape[1] == 4


def test_max_new_tokens_of_the_checkpoint(
    model: Qwen2VL, processor: Qwen2VLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = cases.make("text", processor)
    given = {**model.generation_config, "max_new_tokens": 3, "eos_token_id": []}
    monkeypatch.setattr(model, "generation_config", given)
    length = inputs["input_ids"].shape[1]
    assert model.generate(**inputs).shape[1] == length + 3
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == length + 2
    assert model.generate(**inputs, max_length=length + 4).shape[1] == length + 4
    both = {**given, "max_length": length + 1}  # as transformers: max_new_tokens goes first
    monkeypatch.setattr(model, "generation_config", both)
    assert model.generate(**inputs).shape[1] == length + 3


def test_max_length_of_the_checkpoint(
    model: Qwen2VL, processor: Qwen2VLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = cases.make("text", processor)
    length = inputs["input_ids"].shape[1]
    given = {**model.generation_config, "max_length": length + 5, "eos_token_id": []}
    monkeypatch.setattr(model, "generation_config", given)
    assert model.generate(**inputs).shape[1] == length + 5
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == length + 2
    assert model.generate(**inputs, max_length=length + 4).shape[1] == length + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_strings": ""}, "stop_strings: expected a string or several, none empty, got ''"),
        ({"stop_strings": ["a", ""]}, "stop_strings: expected a string or several, none empty"),
        ({"stop_strings": [3]}, "stop_strings: expected a string or several, none empty"),
        ({"stop_strings": "a"}, "tokenizer: expected the model's with stop_strings, got None"),
        ({"max_length": "9"}, "max_length: expected an integer, got '9'"),
    ],
)
def test_bad_options_are_named(
    options: dict[str, Any],
    message: str,
    model: Qwen2VL,
    processor: Qwen2VLProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "prefill", None)  # before anything is computed
    with pytest.raises(ValueError, match=message):
        model.generate(**cases.make("text", processor), **options)
