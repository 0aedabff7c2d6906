"""A server's tokenizer and chat template, so that this machine needs no files of the model."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from kvcag.chat_template import ChatTemplate, Message
from kvcag.engines.vllm.client import HTTPClient, M, Text, Tokens
from kvcag.errors import InvalidInputError, ServerError

PROBE: list[Message] = [
    {"role": "user", "content": "Ünïcode 12,345.67 naïve\n\n\tdef f(x): return x**2  # 日本語 🙂"},
    {"role": "assistant", "content": "It's done."},
]
"""A chat for which different tokenizers and chat templates give different tokens."""

_REMEMBERED = 4096
"""The most texts whose tokens are cached; the least recently used are dropped first."""

_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>|\[/?[A-Z_]{3,20}\]")
"""Matches special tokens of the known model families. Each match is checked with the server."""


class ServerTokenizer:
    """The methods of a Hugging Face tokenizer that prompts need, over vLLM's `/tokenize` and `/detokenize`.

    Each text that is not among the last 4,096 takes one request.

    Args:
        http: the server.
        model: the model's name on the server.

    Raises:
        InvalidInputError: the server has no `/tokenize`.
    """

    def __init__(self, http: HTTPClient, model: str) -> None:
        self._http, self._model = http, model
        self._known: OrderedDict[tuple[str, bool], tuple[int, ...]] = OrderedDict()
        self._lock = threading.Lock()
        self._encode("x", special=False)

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        """Return the text's token ids, as `{"input_ids": […]}`."""
        return {"input_ids": list(self._encode(text, add_special_tokens))}

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        """Return the text of tokens, including special tokens."""
        return self._request(Text, "/detokenize", tokens=list(token_ids)).prompt if token_ids else ""

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Render messages with the server's template.

        Raises:
            TemplateError: the template refuses the messages.
        """
        body: dict[str, Any] = {"messages": list(conversation), "add_generation_prompt": add_generation_prompt}
        body |= {"tools": list(tools)} if tools else {}
        body |= {"chat_template_kwargs": variables} if variables else {}
        try:
            return self.decode(self._request(Tokens, "/tokenize", **body).tokens)
        except ServerError as refused:
            if refused.status not in (400, 422):
                raise
            raise TemplateError(refused.detail) from refused

    @cached_property
    def chat_template(self) -> str | None:
        """A rendered turn, in place of the template's source; None if the server has no template."""
        try:
            return self.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)
        except TemplateError:
            return None

    @cached_property
    def bos_token_id(self) -> int | None:
        """The token that the tokenizer adds before a text; None if it adds none."""
        plain, special = self._encode("x", special=False), self._encode("x", special=True)
        return special[0] if special != plain and special[1 : 1 + len(plain)] == plain else None

    @cached_property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Special token → id, for those that the chat template writes."""
        function = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
        call = {"type": "function", "id": "probe0000", "function": {"name": "f", "arguments": {}}}
        shown = self.chat_template or ""
        for answer in ({"content": "x"}, {"content": "", "tool_calls": [call]}):
            turns: list[dict[str, Any]] = [{"role": "user", "content": "x"}, {"role": "assistant", **answer}]
            try:
                shown += self.apply_chat_template(turns, tools=[{"type": "function", "function": function}])
            except TemplateError:
                continue
        found = {text: self._encode(text, special=False) for text in sorted(set(_SPECIAL.findall(shown)))}
        return {text: ids[0] for text, ids in found.items() if len(ids) == 1}

    @property
    def all_special_tokens(self) -> list[str]:
        """The texts of `added_tokens_encoder`."""
        return list(self.added_tokens_encoder)

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        key = (text, special)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        ids = tuple(self._request(Tokens, "/tokenize", prompt=text, add_special_tokens=special).tokens)
        with self._lock:
            self._known[key] = ids
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return ids

    def _request(self, kind: type[M], path: str, **body: Any) -> M:
        answer = self._http.json(kind, path, {"model": self._model, **body})
        if answer is None:
            raise InvalidInputError(
                f"{self._http.root} has no {path}, so it cannot tokenize prompts. Pass tokenizer=, the model's folder "
                "or hub id."
            )
        return answer


def check_tokens(http: HTTPClient, model: str, template: ChatTemplate) -> bool:
    """Compare a local tokenizer with the server's. Without this, other token ids would be another text, unnoticed.

    Returns:
        False if the server has no `/tokenize`, so that nothing was compared.

    Raises:
        InvalidInputError: the two tokenizers differ.
    """
    text = template.render(PROBE, add_generation_prompt=False)
    answer = http.json(Tokens, "/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
    if answer is None:
        return False
    if tuple(answer.tokens) != template.encode(text):
        name = getattr(template.tokenizer, "name_or_path", "")
        raise InvalidInputError(
            f"the tokenizer {name!r} is not the tokenizer of {model!r} on {http.root}: they give different token ids "
            "for the same text. Pass the model's own tokenizer, or leave tokenizer= out."
        )
    return True
