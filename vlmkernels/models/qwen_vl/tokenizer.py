"""Qwen's tokenizer from its vocabulary file `qwen.tiktoken`: byte-level BPE by ranks.

Ordinary text goes through the `tokenizers` library, whose merges are made from the ranks; special
tokens, image places and decoding are a few lines here, as in the published code.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

from vlmkernels.models.checkpoint import Json, read_json, write_json, write_text
from vlmkernels.models.tokenizer import Tokenizer

VOCAB_FILE, CONFIG_FILE = "qwen.tiktoken", "tokenizer_config.json"
# How text is cut into words before merging.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMG_START, IMG_END, IMG_PAD = "<img>", "</img>", "<imgpad>"
IMAGE_TAGS = (*GROUNDING, IMG_START, IMG_END, IMG_PAD)
# In the order of their ids, which follow the ranks.
SPECIAL = (
    *(END_OF_TEXT, IM_START, IM_END),
    *(f"<|extra_{i}|>" for i in range(205)),
    *IMAGE_TAGS,
)


class QwenTokenizer(Tokenizer):
    """Token ids equal to those of the published `QWenTokenizer`.

    ranks: token bytes -> rank, which is its id: 0, 1, 2, ... num_slots: how many places an image
    takes. ValueError for ranks with gaps or without all single bytes.
    """

    def __init__(
        self, ranks: dict[bytes, int], config: Json | None = None, *, num_slots: int = 256
    ) -> None:
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"{VOCAB_FILE}: expected the ranks 0, 1, 2, ..., each once")
        if missing := [i for i in range(256) if bytes([i]) not in ranks]:
            raise ValueError(f"{VOCAB_FILE}: expected every byte, got none for {missing}")
        self.num_slots = num_slots
        self.special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
        super().__init__(_backend(ranks), config)
        self.bytes_of = sorted(ranks, key=ranks.__getitem__) + [token.encode() for token in SPECIAL]
        self.eos_token_id = self.pad_token_id = self.special[END_OF_TEXT]

    @classmethod
    def from_pretrained(cls, path: str | Path, *, num_slots: int = 256) -> QwenTokenizer:
        """From a checkpoint directory; ValueError when it holds no usable qwen.tiktoken."""
        path = Path(path)
        config = path / CONFIG_FILE
        ranks = read_ranks(path / VOCAB_FILE)
        return cls(ranks, read_json(config) if config.is_file() else {}, num_slots=num_slots)

    def save_pretrained(self, path: str | Path) -> None:
        """Write qwen.tiktoken and tokenizer_config.json."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        ranks = self.bytes_of[: self.special[END_OF_TEXT]]
        lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks))
        write_text(path / VOCAB_FILE, "".join(lines))
        write_json(path / CONFIG_FILE, {"tokenizer_class": "QWenTokenizer"} | self.config)

    def __len__(self) -> int:
        return len(self.bytes_of)

    def token_to_id(self, token: str) -> int:
        return self.special[token] if token in self.special else super().token_to_id(token)

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = False,
        allowed_special: Collection[str] = SPECIAL,
    ) -> list[int]:
        """Token ids of `text`, which is first brought to Unicode's NFC.

        What stands between <img> and </img>, a path, becomes its bytes and then <imgpad>, num_slots
        in all. add_special_tokens changes nothing: no token is put around a text.

        Args:
            allowed_special: special tokens that count as such where they are written in `text`;
                others are text like any other, so that nobody can write a turn of somebody else.

        Raises:
            ValueError: an <img> without </img>, a path of more than num_slots bytes, a special
                token in it, half a surrogate pair, an unknown token in allowed_special.
        """
        text = unicodedata.normalize("NFC", text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: expected Unicode text: {error}") from error
        if unknown := sorted(set(allowed_special) - self.special.keys()):
            raise ValueError(f"allowed_special: expected special tokens, got {unknown}")
        parts = [text]
        if allowed_special:
            pattern = "|".join(re.escape(token) for token in allowed_special)
            parts = re.split(f"({pattern})", text)
        ids: list[int] = []
        for i, part in enumerate(parts):  # every other part is a special token
            if i % 2:
                ids.append(self.special[part])
            elif part:
                ids += self.backend.encode(part, add_special_tokens=False).ids
        return list(self._with_slots(ids))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        Places of an image become its path again. Tags of boxes stay with skip_special_tokens too:
        they are part of an answer. Ids that no token has give nothing.
        """
        grounding = {self.special[token] for token in GROUNDING}
        first = self.special[END_OF_TEXT]
        kept = (
            i
            for i in self._without_slots(list(ids))
            if not skip_special_tokens or i < first or i in grounding
        )
        text = b"".join(self.bytes_of[i] for i in kept if 0 <= i < len(self.bytes_of))
        return text.decode("utf-8", errors="replace")

    def _with_slots(self, ids: list[int]) -> Iterator[int]:
        """Between <img> and </img>: from tokens of the path to its bytes, padded."""
        end = 0
        for start, stop in self._images(ids):
            if stop < 0:
                raise ValueError("text: expected </img> after <img>, found none")
            path = ids[start + 1 : stop]
            if any(i >= self.special[END_OF_TEXT] for i in path):
                raise ValueError("text: expected a path in <img>...</img>, got a special token")
            slots = b"".join(self.bytes_of[i] for i in path)
            if len(slots) > self.num_slots:
                raise ValueError(
                    f"text: expected at most {self.num_slots} bytes in <img>...</img>, "
                    f"got {len(slots)}"
                )
            yield from ids[end : start + 1]
            yield from slots
            yield from [self.special[IMG_PAD]] * (self.num_slots - len(slots))
            end = stop
        yield from ids[end:]

    def _without_slots(self, ids: list[int]) -> Iterator[int]:
        """The reverse; what is no path stays as it is."""
        end, pad = 0, self.special[IMG_PAD]
        for start, stop in self._images(ids):
            slots = ids[start + 1 : max(stop, 0)]
            path = slots[: slots.index(pad)] if pad in slots else slots
            if stop < 0 or any(not 0 <= i < 256 for i in path):
                continue
            yield from ids[end : start + 1]
            yield from (self.bytes_of.index(bytes([i])) for i in path)
            end = stop
        yield from ids[end:]

    def _images(self, ids: list[int]) -> Iterator[tuple[int, int]]:
        """Where each <img> and its </img> stand; -1 for one that is not closed."""
        opening, closing = self.special[IMG_START], self.special[IMG_END]
        stop = 0
        while stop >= 0 and opening in ids[stop:]:
            start = ids.index(opening, stop)
            stop = ids.index(closing, start) if closing in ids[start:] else -1
            yield start, stop


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token bytes -> rank from lines "base64 rank"; ValueError for anything else."""
    if not file.is_file():
        raise ValueError(f"tokenizer: expected {file}, found none")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{file}: line {number}: expected a token and its rank") from error
    return ranks


def _backend(ranks: dict[bytes, int]) -> tokenizers.Tokenizer:
    """BPE that always joins the two neighbours whose union has the lowest rank."""
    letters = _byte_letters()
    names = {token: "".join(letters[i] for i in token) for token in ranks}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        # Every way to cut a token in two tokens is a merge, and as early as the token's rank.
        cuts = (i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks)
        merges += [(names[token][:i], names[token][i:]) for i in cuts]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return backend


def _byte_letters() -> list[str]:
    """The letter by which the library writes each byte: itself where it is visible, in Latin-1,
    and U+0100, U+0101, ... for the others in order."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(i if i in visible else next(others)) for i in range(256)]
