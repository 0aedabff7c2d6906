"""What a server is and can do: asked once, and again when it was restarted; what it lacks is said once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvcag.chat_template import ChatTemplate, Message
from kvcag.engines.constrain import ServerConstraint
from kvcag.engines.vllm.client import HTTPClient
from kvcag.engines.vllm.constrain import Ability, ability
from kvcag.errors import ConstraintError, InvalidInputError, ServerError, WarnOnce

PROBE: list[Message] = [
    {"role": "user", "content": "Ünïcode 12,345.67 naïve\n\n\tdef f(x): return x**2  # 日本語 🙂"},
    {"role": "assistant", "content": "It's done."},
]
"""Text that tokenizers and chat templates disagree on, if they disagree at all."""

_SHOULD_HIT = 256
"""Tokens in common with the prompt before, from which on a vLLM server that reports hits would report one."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server says of itself.

    Attributes:
        model: the model's name.
        context_length: the most tokens, prompt and answer together; None if it does not say.
        is_vllm: whether it knows vLLM's own fields.
    """

    model: str
    context_length: int | None
    is_vllm: bool


class Server:
    """A server as it is known so far. Safe to use from several threads: what is asked once, one of them asks.

    Args:
        wire: the way to it.
        model: the model that it shall serve; empty for the only one it has.
        notices: where it is said what it lacks.
    """

    def __init__(self, wire: HTTPClient, model: str, notices: WarnOnce) -> None:
        self.wire, self._model, self._notices = wire, model, notices
        self._facts: Facts | None = None
        self._can: Ability | None = None
        self._same_tokens = False
        self._last: dict[str, tuple[int, ...]] = {}
        self._asking = threading.RLock()

    def forget(self) -> None:
        """Ask again: another server may have started in its place."""
        with self._asking:
            self._facts, self._can, self._same_tokens = None, None, False

    def check(self, template: ChatTemplate | None) -> None:
        """Ask what it is now, and compare a local tokenizer with its own, if there is one. Raises as `facts` does."""
        with self._asking:
            self.forget()
            self._facts = self._read()
            if template is not None:
                self.check_tokens(template)

    @property
    def facts(self) -> Facts:
        """What it says of itself.

        Raises:
            InvalidInputError: it does not serve the model, or serves several and none was named.
        """
        with self._asking:
            if self._facts is None:
                self._facts = self._read()
            return self._facts

    def can(self, complete: Callable[[Mapping[str, Any]], str]) -> Ability:
        """What it can hold an answer to; `complete` asks it for a short one."""
        with self._asking:
            if self._can is None:
                self._can = ability(complete)
            return self._can

    def check_tokens(self, template: ChatTemplate) -> None:
        """Compare a local tokenizer with the server's: other ids would be another text, and no error.

        Raises:
            InvalidInputError: they differ.
        """
        with self._asking:
            if self._same_tokens:
                return
            text = template.render(PROBE, add_generation_prompt=False)
            asked = {"model": self.facts.model, "prompt": text, "add_special_tokens": False}
            answer = self.wire.post("/tokenize", asked)
            if not isinstance(answer, dict) or "tokens" not in answer:
                self._notices.once(
                    f"{self.wire.root} has no /tokenize as vLLM has, so it is not known whether the tokenizer is the "
                    "server's. With another one every answer would be to another text."
                )
            elif tuple(answer["tokens"]) != template.encode(text):
                name = getattr(template.tokenizer, "name_or_path", "")
                raise InvalidInputError(
                    f"the tokenizer {name!r} is not that of {self.facts.model!r} on {self.wire.root}: their ids of the "
                    "same text differ. Pass the model's own, or none."
                )
            self._same_tokens = True

    def knows_salt(self, namespace: str) -> bool:
        """Whether it keeps namespaces apart; said once where it does not."""
        if namespace and not self.facts.is_vllm:
            self._notices.once(
                f"{self.wire.root} is no vLLM server, so its prefix cache knows no salt: namespaces share hits, "
                "and an answer's time tells whether another one asked before. Give each namespace its own server, or "
                "switch its prefix cache off."
            )
        return self.facts.is_vllm

    def notice_hits(self, token_ids: tuple[int, ...], namespace: str, cached_tokens: int | None) -> None:
        """Say so where the server must have had a hit and does not report it."""
        begins_alike = self._last.get(namespace) == token_ids[:_SHOULD_HIT]
        if len(token_ids) > _SHOULD_HIT:
            self._last[namespace] = token_ids[:_SHOULD_HIT]
        if cached_tokens is None and begins_alike:
            self._notices.once(
                f"{self.wire.root} does not report cached tokens, so usage shows none: start vLLM with "
                "--enable-prompt-tokens-details"
            )

    def explained(self, refused: ServerError, held: ServerConstraint | None) -> ServerError | ConstraintError:
        """A refusal; of the constraint, if one was sent."""
        if held is not None and refused.status in (400, 422):
            shown = json.dumps(dict(held.fields), ensure_ascii=False)[:200]
            return ConstraintError(f"the server cannot use the constraint: {refused.detail} (it was sent {shown})")
        return refused

    def _read(self) -> Facts:
        listed = self.wire.get("/v1/models")
        cards = listed.get("data") if isinstance(listed, dict) else None
        if not cards:
            self._notices.once(f"{self.wire.root} does not list its models (/v1/models), so nothing is known of it")
            return Facts(self._model, None, is_vllm=False)
        names = [card["id"] for card in cards]
        name = self._model or names[0]
        if name not in names or (not self._model and len(names) > 1):
            raise InvalidInputError(f"{self.wire.root} serves {', '.join(names)}: pass one of them as model=")
        card = next(card for card in cards if card["id"] == name)
        return Facts(name, card.get("max_model_len"), card.get("owned_by") == "vllm")
