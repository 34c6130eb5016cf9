"""Qwen's tokenizer against tiktoken, which the published code calls."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest
import tiktoken

from tests.models.qwen_vl.conftest import make_ranks
from vlmkernels.models.qwen_vl import QwenTokenizer
from vlmkernels.models.qwen_vl.tokenizer import IMAGE_TAGS, PATTERN, SPECIAL

PIECES = [
    *("a", "b", "the", " dog", "cats", "图中", "一", "1", "٣", "²", "é", "e\u0301", "Å", "ﬁ", "ß"),
    *(" ", "  ", "\n", "\r\n", "\t", "\x00", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "\u200d"),
    *("'s", "'S", "'ſ", "'ll", "!", "!\n", "😀", "\u0301", "\ud7a3", "\ue000", "\U000e0041", "|>"),
    *("<|im_start|>", "<|im_end|>", "<|extra_1|>", "<|extra_20|>", "<ref>", "</box>", "<|im_"),
]


def tiktoken_of(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def random_text(draw: random.Random) -> str:
    def piece() -> str:
        if draw.random() < 0.8:
            return draw.choice(PIECES)
        low, high = draw.choice([(0x20, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000)])
        return chr(draw.randrange(low, high))

    return "".join(piece() for _ in range(draw.randint(0, 25)))


@pytest.mark.parametrize("seed", range(4))
def test_text_of_every_kind(seed: int) -> None:
    draw, ranks = random.Random(seed), make_ranks()
    ours, theirs = QwenTokenizer(ranks), tiktoken_of(ranks)
    for _ in range(200):
        text = random_text(draw)
        normal = unicodedata.normalize("NFC", text)
        for allowed in (set(SPECIAL), set(IMAGE_TAGS), set[str]()):
            expected = theirs.encode(normal, allowed_special=allowed, disallowed_special=())
            ids = ours.encode(text, allowed_special=allowed)
            assert ids == expected, (text, allowed)
            assert ours.decode(ids, skip_special_tokens=False) == normal


@pytest.mark.parametrize("seed", range(40))
def test_vocabularies_that_no_training_gave(seed: int) -> None:
    """Random strings with random ranks: a token may not be reached by merges, or by several."""
    draw = random.Random(seed)
    letters = draw.choice(["ab", "abc", "a "])
    tokens = {bytes([i]) for i in range(256)}
    count = 256 + draw.choice([5, 30, 60])
    while len(tokens) < count:
        tokens.add("".join(draw.choices(letters, k=draw.randint(2, 8))).encode())
    order = sorted(tokens)
    draw.shuffle(order)
    ranks = {token: i for i, token in enumerate(order)}
    ours, theirs = QwenTokenizer(ranks), tiktoken_of(ranks)
    for _ in range(50):
        text = "".join(draw.choices(letters, k=draw.randint(1, 60)))
        assert ours.encode(text) == theirs.encode(text), text


def test_ids_are_those_of_the_published_tokenizer(chat_dir: Path) -> None:
    """Their numbers follow the 151643 ranks of the published file in this order."""
    tokenizer = QwenTokenizer.from_pretrained(chat_dir)
    shift = 151643 - tokenizer.special["<|endoftext|>"]
    published = {"<|im_start|>": 151644, "<|im_end|>": 151645, "<|extra_204|>": 151850}
    published |= {"<ref>": 151851, "<box>": 151853, "</quad>": 151856}
    published |= {"<img>": 151857, "</img>": 151858, "<imgpad>": 151859}
    assert {token: tokenizer.token_to_id(token) + shift for token in published} == published
    assert len(tokenizer) + shift == 151860
    assert tokenizer.token_to_id("a") == make_ranks()[b"a"]


def test_paths_stand_in_the_places_of_images() -> None:
    tokenizer = QwenTokenizer(make_ranks(), num_slots=8)
    start, end, pad = (tokenizer.special[t] for t in ("<img>", "</img>", "<imgpad>"))
    text = "a<img>é.png</img>b<img></img>"
    ids = tokenizer.encode(text)
    assert ids[1:11] == [start, *"é.png".encode(), pad, pad, end]
    assert ids[12:] == [start, *[pad] * 8, end]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == "aé.pngb"
    assert tokenizer.encode("<img>12345678</img>")[1:9] == [*b"12345678"]
    assert tokenizer.decode(tokenizer.encode("<img>12345678</img>")) == "12345678"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a <img> b", "expected </img> after <img>, found none"),
        ("</img><img>", "expected </img> after <img>, found none"),
        ("<img>123456789</img>", "expected at most 8 bytes in <img>...</img>, got 9"),
        ("<img>a<img>b</img>", "expected a path in <img>...</img>, got a special token"),
        ("<img><imgpad></img>", "expected a path in <img>...</img>, got a special token"),
        ("half \ud800 a pair", "expected Unicode text"),
    ],
)
def test_texts_that_cannot_be_encoded(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QwenTokenizer(make_ranks(), num_slots=8).encode(text)


def test_only_special_tokens_are_allowed_as_such() -> None:
    with pytest.raises(ValueError, match=r"expected special tokens, got \['dog'\]"):
        QwenTokenizer(make_ranks()).encode("a dog", allowed_special=["dog", "<ref>"])


def test_any_ids_decode() -> None:
    """Those of half a character, of broken images, of no token; tags of boxes stay."""
    tokenizer = QwenTokenizer(make_ranks(), num_slots=8)
    start, end = tokenizer.special["<img>"], tokenizer.special["</img>"]
    half = tokenizer.encode("é")[:1]
    assert tokenizer.decode(half) == "\ufffd"
    for ids in ([start], [end, start], [start, 300, end], [start, -1, end], [10**6, -1], []):
        assert tokenizer.decode([*ids, *tokenizer.encode("dog")]).endswith("dog")
    answer = "<ref>dog</ref><box>(1,2),(3,4)</box>"
    ids = tokenizer.encode(f"<|im_start|>{answer}<|im_end|><|endoftext|>")
    assert tokenizer.decode(ids) == answer


def test_streamed_text_is_the_decoded_text() -> None:
    tokenizer = QwenTokenizer(make_ranks())
    ids = tokenizer.encode("图中 a dog <ref>é😀</ref>")
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_round_trip(chat_dir: Path, tmp_path: Path) -> None:
    tokenizer = QwenTokenizer.from_pretrained(chat_dir)
    tokenizer.save_pretrained(tmp_path)
    for name in ("qwen.tiktoken", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (chat_dir / name).read_bytes()
    padded = tokenizer.pad([[5], [6, 7, 8]])
    end = tokenizer.special["<|endoftext|>"]
    assert padded["input_ids"].tolist() == [[end, end, 5], [6, 7, 8]]
    assert padded["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected .*qwen.tiktoken, found none"),
        (b"IQ== 0\nIg==\n", "line 2: expected a token and its rank"),
        (b"IQ== zero\n", "line 1: expected a token and its rank"),
        (b"I? 0\n", "line 1: expected a token and its rank"),
        (b"IQ== 0\nIg== 2\n", "expected the ranks 0, 1, 2, ..., each once"),
        (b"IQ== 0\nIg== 1\n", r"expected every byte, got none for \[0, 1, "),
    ],
)
def test_broken_vocabularies(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        QwenTokenizer.from_pretrained(tmp_path)
