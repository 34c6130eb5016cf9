"""Text to token ids and back, from a checkpoint's tokenizer.json; chat templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
import torch
from torch import Tensor

from vlmkernels.models.checkpoint import Json, read_json, write_json, write_text
from vlmkernels.models.fields import TEXT, expect


class Tokenizer:
    """A `tokenizers.Tokenizer` with the special tokens and chat template of its checkpoint."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Json | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        # A text cut short or padded here would no longer match its images.
        backend.no_truncation()
        backend.no_padding()
        self.config: Json = dict(config or {})
        self.chat_template = chat_template or _template_of(self.config)
        self.eos_token_id = self._special("eos_token")
        self.pad_token_id = self._special("pad_token")
        if self.pad_token_id is None:
            self.pad_token_id = self.eos_token_id
        self.padding_side: str = self.config.get("padding_side", "left")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """From a checkpoint directory; ValueError when it holds no usable tokenizer.json."""
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"tokenizer: expected {file}, found none")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer: {file} cannot be read: {error}") from error
        config = path / "tokenizer_config.json"
        return cls(backend, read_json(config) if config.is_file() else {}, _read_template(path))

    def save_pretrained(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.json if there is one."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "tokenizer.json", self.backend.to_str(pretty=True))
        write_json(path / "tokenizer_config.json", self.config)
        if self.chat_template:
            write_json(path / "chat_template.json", {"chat_template": self.chat_template})

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written in it count as such.

        add_special_tokens: put those around it that tokenizer.json says (CLIP's start and end,
        LLaMA's start).
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def pad(self, rows: Sequence[list[int]], padding_side: str | None = None) -> dict[str, Tensor]:
        """input_ids and attention_mask (num_rows, longest) int64; the tokenizer's side."""
        side = padding_side or self.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side: expected 'left' or 'right', got {side!r}")
        seqlen = max(len(row) for row in rows)
        if self.pad_token_id is None and any(len(row) < seqlen for row in rows):
            raise ValueError("tokenizer: expected a pad_token for texts of different length")
        input_ids = torch.full((len(rows), seqlen), self.pad_token_id or 0)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            place = slice(seqlen - len(row), None) if side == "left" else slice(0, len(row))
            input_ids[i, place] = torch.tensor(row, dtype=torch.int64)
            attention_mask[i, place] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"tokenizer: expected a token {token!r}, found none")
        return token_id

    def apply_chat_template(
        self, messages: Sequence[Json], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The checkpoint's chat template filled in with `messages`, as text."""
        if not self.chat_template:
            raise ValueError("chat template: the checkpoint has none")
        # Published files also say "bos_token": null and "add_bos_token": false.
        named = {k: v for k, v in self.config.items() if k.endswith("_token")}
        try:
            return _render(
                self.chat_template,
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **{k: _text(v) for k, v in named.items() if isinstance(v, (str, dict))},
                **variables,
            )
        except Exception as error:  # a template is foreign code: any error may come out of it
            raise ValueError(f"chat template: {error}") from error

    def stream(self) -> TextStream:
        return TextStream(self)

    def _special(self, name: str) -> int | None:
        value = self.config.get(name)
        return None if value is None else self.token_to_id(_text(value))


class TextStream:
    """Token ids in, text out as soon as it is certain; never half a UTF-8 character.

    A byte-level token may end inside a character, which decodes to U+FFFD: the text waits until
    the character is whole, and half a character at the very end is dropped.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.done = 0  # ids whose text is out
        self.context = 0  # decoding starts here, since a token's text may depend on those before

    def push(self, token_id: int) -> str:
        """The text that became certain with this token, often one word, sometimes none."""
        self.ids.append(token_id)
        before = self.tokenizer.decode(self.ids[self.context : self.done])
        text = self.tokenizer.decode(self.ids[self.context :])
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        self.context, self.done = self.done, len(self.ids)
        return text[len(before) :]

    def finish(self) -> str:
        """What is left, without a last incomplete character."""
        before = self.tokenizer.decode(self.ids[self.context : self.done])
        text = self.tokenizer.decode(self.ids[self.context :])
        self.context = self.done = len(self.ids)
        return text[len(before) :].rstrip("\ufffd")


def _text(token: str | Json) -> str:
    """A special token is written as text or as {"content": text}."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"tokenizer: expected a special token as text, got {token!r}")
    return text


def _template_of(config: Json) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return None if template is None else str(expect("chat_template", template, TEXT))


def _read_template(path: Path) -> str | None:
    """The template in a file of its own, which goes before the one in tokenizer_config.json."""
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        template = _template_of(read_json(path / name)) if (path / name).is_file() else None
        if template:
            return template
    return None


def _render(template: str, **variables: Any) -> str:
    """Sandboxed: a template comes with the checkpoint and may not reach into Python."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise ValueError(message)

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks what a model says: it stays as it is."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's own way)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    # As in transformers: readable JSON, not HTML-escaped.
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    env.globals["raise_exception"] = raise_exception
    return env.from_string(template).render(**variables)
