"""Texts that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlmkernels.models.fields import TEXTS, expect


def expect_stop_strings(strings: str | Sequence[str] | None, tokenizer: Any) -> None:
    """ValueError unless there are none, or texts and a tokenizer."""
    if strings is None:
        return
    expect("stop_strings", strings, TEXTS)
    if not hasattr(tokenizer, "decode"):
        raise ValueError(
            f"tokenizer: expected the model's with stop_strings, got {tokenizer!r:.80}"
        )


class StopStrings:
    """Which rows of text, prompt included, hold one of `strings` where their last token is.

    Special tokens are text like any other, so "<|im_end|>" may be given. A token that only begins
    with the rest of a string ends the row too, as in transformers.

    tokenizer: its `decode(ids, skip_special_tokens=False)` gives the text.
    prompts: (batch, n) ids; mask: 0 for padding in them, None when there is none.
    """

    def __init__(
        self, strings: str | Sequence[str], tokenizer: Any, prompts: Tensor, mask: Tensor | None
    ) -> None:
        self.strings = [strings] if isinstance(strings, str) else list(strings)
        self.tokenizer = tokenizer
        # A token is a byte at least; the first of a text may lose its space.
        self.window = max(len(s.encode()) for s in self.strings) + 1
        real = prompts >= 0 if mask is None else mask != 0
        self.prompts: list[list[int]] = [
            ids[here][-self.window :].tolist() for ids, here in zip(prompts, real, strict=True)
        ]

    def hit(self, new: Tensor) -> list[bool]:
        """new (rows, n) token ids so far, n > 0, rows of the same prompt together -> (rows,)"""
        rows: list[list[int]] = new[:, -self.window :].tolist()
        count = len(rows) // max(len(self.prompts), 1)
        return [self._hits(self.prompts[i // count] + row) for i, row in enumerate(rows)]

    def _hits(self, ids: list[int]) -> bool:
        before, text = (
            self.tokenizer.decode(x, skip_special_tokens=False)
            for x in (ids[-self.window : -1], ids[-self.window :])
        )
        certain = len(before.rstrip("\ufffd"))  # the last token may complete a character
        return any(text.find(s, max(0, certain - len(s) + 1)) >= 0 for s in self.strings)
