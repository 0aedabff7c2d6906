"""A server's tokenizer and chat template, for `ChatTemplate`: nothing of the model need be on this machine."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from kvcag.engines.vllm.client import HTTPClient
from kvcag.errors import InvalidInputError, ServerError

_REMEMBERED = 4096
"""Texts whose tokens are kept, the least recently used leaving first: a document is tokenised for every question."""

_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>|\[/?[A-Z_]{3,20}\]")
"""What the families' special tokens look like. Each that is found is checked with the server."""


class ServerTokenizer:
    """`/tokenize` and `/detokenize` of a vLLM server, with the part of a Hugging Face tokenizer that prompts need.

    Every text that was not asked for lately is one request. With a local tokenizer there is none.

    Args:
        wire: the server.
        model: its name there.

    Raises:
        InvalidInputError: the server has no `/tokenize`.
    """

    def __init__(self, wire: HTTPClient, model: str) -> None:
        self._wire, self._model = wire, model
        self._known: OrderedDict[tuple[str, bool], tuple[int, ...]] = OrderedDict()
        self._lock = threading.Lock()
        self._encode("x", special=False)

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        """The text's token ids."""
        return {"input_ids": list(self._encode(text, add_special_tokens))}

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        """The text of tokens, special ones included."""
        if not token_ids:
            return ""
        return str(self._ask("/detokenize", tokens=list(token_ids))["prompt"])

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Messages as the server's template writes them.

        Raises:
            TemplateError: the template refuses them.
        """
        asked: dict[str, Any] = {"messages": list(conversation), "add_generation_prompt": add_generation_prompt}
        asked |= {"tools": list(tools)} if tools else {}
        asked |= {"chat_template_kwargs": variables} if variables else {}
        try:
            return self.decode(self._ask("/tokenize", **asked)["tokens"])
        except ServerError as refused:
            if refused.status not in (400, 422):
                raise
            raise TemplateError(refused.detail) from refused

    @cached_property
    def chat_template(self) -> str | None:
        """How the server's template shows a turn; None where the server has no template. The source stays there."""
        try:
            return self.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)
        except TemplateError:
            return None

    @cached_property
    def bos_token_id(self) -> int | None:
        """The token that the tokenizer puts before a text, if it puts any."""
        plain, special = self._encode("x", special=False), self._encode("x", special=True)
        return special[0] if special != plain and special[1 : 1 + len(plain)] == plain else None

    @cached_property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The special tokens that the template shows, and their ids."""
        function = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
        call = {"type": "function", "id": "probe0000", "function": {"name": "f", "arguments": {}}}
        turns: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
        shown = self.chat_template or ""
        for tried in (
            [*turns, {"role": "assistant", "content": "x"}],
            [*turns, {"role": "assistant", "content": "", "tool_calls": [call]}],
        ):
            try:
                shown += self.apply_chat_template(tried, tools=[{"type": "function", "function": function}])
            except TemplateError:
                continue
        found = {text: self._encode(text, special=False) for text in sorted(set(_SPECIAL.findall(shown)))}
        return {text: ids[0] for text, ids in found.items() if len(ids) == 1}

    @property
    def all_special_tokens(self) -> list[str]:
        """Those of `added_tokens_encoder`."""
        return list(self.added_tokens_encoder)

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        key = (text, special)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        ids = tuple(self._ask("/tokenize", prompt=text, add_special_tokens=special)["tokens"])
        with self._lock:
            self._known[key] = ids
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return ids

    def _ask(self, path: str, **body: Any) -> Any:
        answer = self._wire.post(path, {"model": self._model, **body})
        if answer is None:
            raise InvalidInputError(
                f"{self._wire.root} has no {path}, so its tokenizer cannot be asked: pass tokenizer=, the model's "
                "folder or hub id."
            )
        return answer
