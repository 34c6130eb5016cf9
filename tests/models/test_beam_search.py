"""Beam search against transformers (the same tokens in the same order) and against all answers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import transformers

from tests.models import test_opt, test_t5
from vlmkernels.models.beam_search import Beams, beam_search
from vlmkernels.models.opt import OPT
from vlmkernels.models.rules import Rules
from vlmkernels.models.t5 import T5

NEW = 12
EOS = [31, 53, 73, 76, 94]  # what these random models say now and then
CASES: dict[str, dict[str, Any]] = {
    "published": {"num_beams": 5, "length_penalty": 1.0},
    "short": {"num_beams": 5, "length_penalty": -1.0},  # of BLIP-2's question answering
    "no_penalty": {"num_beams": 3, "length_penalty": 0.0, "num_return_sequences": 3},
    "first_five": {"num_beams": 5, "early_stopping": True, "num_return_sequences": 2},
    "never": {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    "rules": {"num_beams": 5, "min_new_tokens": 4, "repetition_penalty": 1.5},
    "one_eos": {"num_beams": 2, "eos_token_id": 73, "num_return_sequences": 2},
    "no_eos": {"num_beams": 3, "eos_token_id": (), "max_new_tokens": 5},
}


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> tuple[OPT, Any]:
    path = tmp_path_factory.mktemp("opt")
    test_opt.write(path, tie_word_embeddings=False)  # tied ones of a random model say one word
    return OPT.from_pretrained(path), transformers.OPTForCausalLM.from_pretrained(path).eval()


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[T5, Any]:
    path = tmp_path_factory.mktemp("t5")
    test_t5.write(path, "flan")
    hf_model = transformers.T5ForConditionalGeneration.from_pretrained(path)
    return T5.from_pretrained(path), hf_model.eval()


def assert_same(model: Any, hf_model: Any, inputs: dict[str, Any], case: str) -> None:
    options = {"max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": 95} | CASES[case]
    ours: torch.Tensor = model.generate(**inputs, **options)
    options["eos_token_id"] = options["eos_token_id"] or None
    expected = hf_model.generate(**inputs, do_sample=False, **options)
    assert ours.tolist() == expected.tolist()
    if case == "no_penalty":  # some end before others
        assert (ours[:, -1] == 95).any()


@pytest.mark.parametrize("case", CASES)
def test_decoder_only(case: str, opt: tuple[OPT, Any]) -> None:
    # transformers generates after padding on the left only
    inputs = {"input_ids": test_opt.IDS[:2], "attention_mask": test_opt.MASK[:2]}
    assert_same(*opt, inputs, case)


@pytest.mark.parametrize("case", CASES)
def test_encoder_decoder(case: str, t5: tuple[T5, Any]) -> None:
    inputs = {"input_ids": test_t5.IDS, "attention_mask": test_t5.MASK}
    assert_same(*t5, inputs, case)


def test_what_comes_after_the_end_is_padding(t5: tuple[T5, Any]) -> None:
    """As without beams; transformers puts the end token there where, as in T5, padding is 0."""
    model, hf_model = t5
    options = {"max_new_tokens": NEW, "num_beams": 4, "eos_token_id": 73, "length_penalty": 0.0}
    ours = model.generate(test_t5.IDS, **options)
    after = (ours == 73).cumsum(1) - (ours == 73).int() > 0
    assert after.any() and not ours[after].any()
    expected = hf_model.generate(test_t5.IDS, do_sample=False, **options)
    assert torch.equal(ours, expected.masked_fill(after, 0))


@pytest.mark.parametrize("rule", [{"repetition_penalty": 1.3}, {"min_new_tokens": 6}], ids=str)
def test_rules_without_beams(rule: Any, opt: tuple[OPT, Any], t5: tuple[T5, Any]) -> None:
    for (model, hf_model), module in ((opt, test_opt), (t5, test_t5)):
        inputs = {"input_ids": module.IDS[:2], "attention_mask": module.MASK[:2]}
        options = rule | {"max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": 95}
        expected = hf_model.generate(**inputs, do_sample=False, **options)
        assert model.generate(**inputs, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_a_batch_is_its_rows(name: str, request: pytest.FixtureRequest) -> None:
    model, _ = request.getfixturevalue(name)
    module = {"opt": test_opt, "t5": test_t5}[name]
    options = {"num_beams": 4, "max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": 0}
    batch = model.generate(module.IDS, attention_mask=module.MASK, **options)
    new = batch[:, 9:] if name == "opt" else batch
    for i, row in enumerate(new.tolist()):
        prompt = module.IDS[i][module.MASK[i] != 0][None]
        alone = model.generate(prompt, **options)[0, prompt.shape[1] if name == "opt" else 0 :]
        assert row == alone.tolist() + [0] * (len(row) - len(alone))


class Chain:
    """A "model" whose next token depends on the last one and on how many there were."""

    def __init__(self, vocab_size: int, longest: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.logits = 2 * torch.randn(longest, vocab_size, vocab_size, generator=generator)
        self.rows, self.length = 1, 0

    def select(self, rows: torch.Tensor) -> None:
        self.rows = len(rows)

    def decode(self, tokens: torch.Tensor, state: Chain) -> torch.Tensor:
        assert len(tokens) == self.rows
        self.length += 1
        return self.logits[self.length, tokens]


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 2.0])
def test_wide_beams_find_the_best_of_all_answers(length_penalty: float) -> None:
    vocab_size, eos, longest = 4, 3, 4
    chain = Chain(vocab_size, longest)
    log_probs = chain.logits.log_softmax(-1)
    scores = {}
    for length in range(1, longest + 1):
        for answer in itertools.product(range(vocab_size), repeat=length):
            if eos in answer[:-1] or (length < longest and answer[-1] != eos):
                continue
            steps = zip(range(length), (0, *answer[:-1]), answer, strict=True)
            total = sum(float(log_probs[step]) for step in steps)
            scores[answer] = total / length**length_penalty
    best = sorted(scores, key=scores.__getitem__, reverse=True)[:3]
    beams = Beams(64, length_penalty, "never", num_return_sequences=3)
    rules = Rules(torch.tensor([eos]), pad_id=9, max_new_tokens=longest)
    found = beam_search(chain.logits[0, :1], chain, chain.decode, beams, rules).tolist()
    assert [tuple(x for x in row if x != 9) for row in found] == best
    assert chain.rows == 64


def test_streaming_is_refused(opt: tuple[OPT, Any]) -> None:
    with pytest.raises(ValueError, match="num_beams: expected 1 to get tokens as they come, got 5"):
        next(opt[0].generate_steps(input_ids=test_opt.IDS, num_beams=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected a positive integer, got 0"),
        ({"num_beams": 2.0}, "num_beams: expected a positive integer, got 2.0"),
        ({"num_beams": "3"}, "num_beams: expected a positive integer, got '3'"),
        ({"num_beams": 2, "num_return_sequences": 1.0}, "num_return_sequences: expected a pos"),
        ({"num_beams": 2, "length_penalty": "1"}, "length_penalty: expected a number, got '1'"),
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping: expected True, False or"),
        ({"eos_token_id": 96, "min_new_tokens": 2}, "eos_token_id: expected below vocab_size = 96"),
        ({"eos_token_id": [5, 99], "num_beams": 2}, "eos_token_id: expected .* 96, got 99"),
        ({"length_penalty": 2.0}, "length_penalty, early_stopping: expected together with"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping: expected True, False or"),
        ({"num_beams": 2, "num_return_sequences": 3}, "expected from 1 to num_beams 2, got 3"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty: expected a number"),
        ({"num_beams": 2, "temperature": 1.0}, "temperature: expected none with num_beams > 1"),
        ({"num_beams": 2, "seed": 0}, "seed: expected none with num_beams > 1"),
        ({"min_new_tokens": 200}, "min_new_tokens: expected from 0 to max_new_tokens 20, got 200"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a positive number, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected an integer, got 2.5"),
        ({"min_new_tokens": "1"}, "min_new_tokens: expected an integer, got '1'"),
        ({"repetition_penalty": "2"}, "repetition_penalty: expected a number, got '2'"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: expected a number, got nan"),
        ({"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
        ({"temperature": -1.0}, "temperature: expected at least 0, got -1.0"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k: expected an integer or null, got 2.5"),
        ({"temperature": 1.0, "top_p": "1"}, "top_p: expected a number, got '1'"),
        ({"temperature": 1.0, "seed": "a"}, "seed: expected an integer, got 'a'"),
    ],
)
def test_bad_options_are_named(options: Any, message: str, opt: tuple[OPT, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        opt[0].generate(test_opt.IDS, **{"max_new_tokens": 20} | options)


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_unknown_keywords_are_those_of_generate(name: str, request: pytest.FixtureRequest) -> None:
    model, _ = request.getfixturevalue(name)
    for option in ("do_sample", "max_time", "labels", "decoder_input_ids", "answer", "prompt"):
        message = rf"^generate\(\) got an unexpected keyword argument '{option}'"
        with pytest.raises(TypeError, match=message):
            model.generate(test_opt.IDS, **{option: 5})


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_inputs_go_to_the_models_device(name: str, request: pytest.FixtureRequest) -> None:
    model = copy.deepcopy(request.getfixturevalue(name)[0]).to("meta")
    model.prefill = lambda max_new_tokens, input_ids: (input_ids.new_zeros(3, 96).float(), None)
    out = model.generate(test_opt.IDS, max_new_tokens=1)
    assert test_opt.IDS.device.type == "cpu" and out.device.type == "meta"
