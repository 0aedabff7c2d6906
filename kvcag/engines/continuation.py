"""How a prompt goes on after a context, and what it may take from it: checked against the model and the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache

from kvcag.cache.hf import ContextCache, LayerKV, cut, layers_of
from kvcag.cache.prefix import PrefixCache
from kvcag.context import ContextPrompt, MergedContext, MergeReport
from kvcag.errors import EmptyPromptError, FingerprintMismatchError, TokenMismatchError
from kvcag.fingerprint import ModelFingerprint
from kvcag.prompt import ChatTemplate, Message, Prompt, as_messages


@dataclass(frozen=True, slots=True)
class Given:
    """The part of a context that a prompt begins with.

    Attributes:
        layers: its keys and values, to be read.
        exact: they are what the model computes for these tokens, so what is generated after them may be kept.
        report: how the context was made, if it says so.
    """

    layers: list[LayerKV]
    exact: bool = True
    report: MergeReport | None = None

    @property
    def length(self) -> int:
        """Tokens in it."""
        return self.layers[0][0].shape[-2] if self.layers else 0

    def longest(self, prefixes: PrefixCache, token_ids: Sequence[int], tenant: str) -> tuple[int, list[list[LayerKV]]]:
        """How many of `token_ids` need not run, and their keys and values: this context, or a longer known prefix."""
        reused, pieces = self.length, [self.layers] if self.layers else []
        if self.exact:
            matched, found = prefixes.match(token_ids, tenant)
            if matched > reused:
                return matched, found
        return reused, pieces


def read_context(
    past_key_values: Cache | MergedContext | None, token_ids: Sequence[int], fingerprint: ModelFingerprint
) -> Given:
    """A context, cut to what the prompt begins with and to what leaves a token to run.

    Raises:
        FingerprintMismatchError: another model made it.
        TokenMismatchError: it does not say which tokens it holds, it holds others than it says, or the prompt begins
            differently.
    """
    if past_key_values is None:
        return Given([])
    report, exact = None, True
    if isinstance(past_key_values, MergedContext):
        report, cache, held = past_key_values.report, past_key_values.cache, past_key_values.token_ids
        made_by, exact = past_key_values.fingerprint, report.mode != "merged"
    elif past_key_values.get_seq_length() == 0:
        return Given([])
    else:
        own = known(past_key_values)
        cache, held, made_by, exact = own, own.token_ids, own.fingerprint, own.exact
    if not fingerprint.matches(made_by):
        raise FingerprintMismatchError("the cache", fingerprint.differences(made_by))
    if cache.get_seq_length() != len(held):
        raise TokenMismatchError(
            f"the cache holds {cache.get_seq_length()} tokens and its token_ids {len(held)}: something was "
            "generated into it, or it was cut. Pass it as it was made; generate() never writes into it."
        )
    agreeing = _common_prefix(held.tolist(), token_ids)
    if agreeing == 0 or (agreeing < len(held) and not exact):
        raise TokenMismatchError(
            f"the prompt agrees with the context's token_ids only in its first {agreeing} of {len(held)} tokens. "
            "Begin the prompt with context.token_ids."
        )
    return Given(cut(layers_of(cache), 0, min(agreeing, len(token_ids) - 1)), exact, report)


def context_ids(
    template: ChatTemplate, prompt: str | Sequence[str] | Sequence[Message]
) -> tuple[tuple[int, ...], list[dict[str, Any]] | None]:
    """The tokens of a context to be continued, and the messages whose closed turns it is.

    Args:
        template: the model's chat template.
        prompt: a str is an open system turn; a list of str is joined into one by blank lines; chat messages are taken
            as they are, as closed turns.

    Raises:
        EmptyPromptError: there is nothing to encode.
    """
    parts: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if all(isinstance(part, str) for part in parts):
        text = "\n\n".join(part for part in parts if part.strip())
        if not text:
            raise EmptyPromptError("the prompt is empty: there is nothing to encode")
        return template.around(None, [_PLACEHOLDER]).head_ids + template.encode(text), None
    messages = [dict(message) for message in parts]
    return template.prompt(messages, add_generation_prompt=False).token_ids, messages


def plan(
    template: ChatTemplate,
    messages: str | Sequence[Message] | None,
    past_key_values: Cache | MergedContext | ContextPrompt | None,
) -> Prompt:
    """The whole prompt that asks `messages`, the context's tokens included.

    Raises:
        TokenMismatchError: the context does not say which tokens it holds.
        EmptyPromptError: there is nothing to ask.
    """
    asked = as_messages(messages) if messages else []
    if isinstance(past_key_values, MergedContext):
        context = tuple(past_key_values.token_ids.tolist())
        if not asked:
            return Prompt(context, (), tuple(past_key_values.tail_ids.tolist()))
        framed = template.around(None, asked)
    elif past_key_values is None or _is_empty(past_key_values):
        return template.prompt(asked)
    else:
        cached = past_key_values if isinstance(past_key_values, ContextPrompt) else known(past_key_values)
        context = tuple(cached.token_ids.tolist())
        if cached.messages is not None:
            return _continued(template, context, cached.messages, asked)
        framed = template.around(None, asked)
    return Prompt(context, (), framed.tail_ids, framed.thinking)


def _continued(
    template: ChatTemplate, context: tuple[int, ...], cached: list[dict[str, Any]], asked: list[Message]
) -> Prompt:
    """The prompt that continues closed turns. `asked` are the new messages, or the conversation as a whole."""
    everything = asked if asked[: len(cached)] == cached else [*cached, *asked]
    closed = template.render(cached, add_generation_prompt=False)
    text = template.render(everything)
    if not text.startswith(closed):  # the template rewrites history; what agrees is found by its ids
        return template.prompt(everything)
    tail = template.encode(text[len(closed) :])
    return Prompt(context, (), tail, thinking=text.rstrip().endswith("<think>"))


def _is_empty(context: Cache | ContextPrompt) -> bool:
    return not (context if isinstance(context, ContextPrompt) else context.get_seq_length())


def known(cache: Cache) -> ContextCache:
    """The cache, if it says which tokens it holds.

    Raises:
        TokenMismatchError: it does not.
    """
    if isinstance(cache, ContextCache):
        return cache
    raise TokenMismatchError(
        f"a {type(cache).__name__} does not say which tokens it holds, so its answer could be wrong and nobody would "
        "know. Pass a cache from build_kv_cache or get_cache, a MergedContext, or wrap it: "
        "ContextCache.of(layers, token_ids, engine.fingerprint)."
    )


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


_PLACEHOLDER: Message = {"role": "user", "content": "…"}
