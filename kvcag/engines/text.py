"""From tokens to text, piece by piece: whole characters, no thinking, no half of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN, _CLOSE = "<think>", "</think>"


class Detokenizer:
    """Turns tokens into text as they come. A character is given out when all of its bytes are there.

    Decodes a short window that overlaps what was given out before, since a token's text depends on its neighbours
    (leading spaces, bytes of one character); the whole answer is never decoded again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._window = 0  # where decoding starts
        self._given = 0  # tokens whose text was given out

    def push(self, token_id: int) -> str:
        """The text that is complete now; empty while a character is not."""
        self._token_ids.append(token_id)
        text = self._pending()
        if text.endswith("\ufffd"):
            return ""
        self._window, self._given = self._given, len(self._token_ids)
        return text

    def flush(self) -> str:
        """What is left when no more tokens come; an unfinished character as U+FFFD."""
        text = self._pending()
        self._window = self._given = len(self._token_ids)
        return text

    def _pending(self) -> str:
        before = self._decode(self._token_ids[self._window : self._given])
        return self._decode(self._token_ids[self._window :])[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings:
    """Cuts a text at the first of several strings, and holds back what may yet become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be given out. Sets `found` once a stop string was seen; it is never given out."""
        text = self._held + text
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


class ThinkingFilter:
    """Leaves out `<think>…</think>` and the blank lines after it.

    Args:
        thinking: the text begins within a thinking block, because the generation prompt opened it.
    """

    def __init__(self, thinking: bool) -> None:
        self._thinking = thinking
        self._held = ""
        self._trim = False

    def push(self, text: str) -> str:
        """The text that is no thinking."""
        self._held += text
        out = ""
        while True:
            tag = _CLOSE if self._thinking else _OPEN
            before, found, after = self._held.partition(tag)
            if not found:
                keep = _overlap(self._held, tag)
                before, self._held = (
                    self._held[: len(self._held) - keep],
                    self._held[len(self._held) - keep :],
                )
                return out + self._visible(before)
            out += self._visible(before)
            self._held = after
            self._thinking = not self._thinking
            self._trim = not self._thinking

    def flush(self) -> str:
        """What was held back and did not become a tag."""
        held, self._held = self._held, ""
        return self._visible(held)

    def _visible(self, text: str) -> str:
        if self._thinking:
            return ""
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a proper beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
