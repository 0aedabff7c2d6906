"""Turns chat messages into token ids, split where caches begin and end: head │ document … document │ tail.

The chat template is rendered once, with a sentinel in place of each group of documents, and the text is split at the
sentinels, so every template works (the idea is from NVIDIA's kvpress). Each segment is tokenised by itself, as if
between line breaks: documents on lines of their own get the same token ids as in the joined text. All later steps use
these token ids, with and without caches.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby, pairwise, takewhile, zip_longest
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from jinja2.exceptions import TemplateError
from typing_extensions import Self

from kvcag.errors import ChatTemplateError, EmptyPromptError, InvalidInputError, UnsupportedContentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = Mapping[str, Any]
"""`{"role": …, "content": …}`; the content is a str, None, or a list of str, `Document` and
`{"type": "text", "text": …}` parts. A last message of the assistant with `"prefix": True` is the beginning of the
answer, which the model continues."""

Seams: TypeAlias = Literal["endings", "documents", "none"]
"""How the documents of a prompt are joined: see `ChatTemplate.prompt`."""

_SECRET = secrets.token_hex(8)
"""Part of every marker in a rendered text. It is random, so that no document can contain a marker."""
_BREAK = f"kvcag-break-{_SECRET}"
"""A marker in a rendered text: the texts before and after it are tokenised separately."""
_LIKE_CONTROL = (
    r"<[|\uff5c][^|\uff5c<>\s]{1,40}[|\uff5c]>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>"
    r"|\[/?(?:INST|[A-Z]+_[A-Z_]+)\]"
)
"""Matches control tokens of the known model families."""
_PROBE = "kvcag-probe-9a41"
_ANYTHING: dict[str, Any] = {"role": "user", "content": "…"}
_OPEN_END = f"kvcag-end-{secrets.token_hex(8)}"
"""A marker in a rendered text: the end of an answer that the model continues."""
_LINE, _WORD = "\n\n", "x"
"""The texts before and after a segment while it is tokenised."""
_SEAM = 24
"""How many characters on each side of a seam are tokenised to see whether the seam changes the tokens."""


SEPARATOR = "\n\n"
"""Ends every document, also the last one."""


def segment(text: str, separator: str = SEPARATOR) -> str:
    """Return a document's text with the separator at its end, so that it has the same tokens in every prompt."""
    return text if text.endswith(separator) else text + separator


class Document(str):
    """A part of a message's content that is cached by itself, by its content.

    Attributes:
        ending: text that the cached document has after this text, but this prompt does not: the separator, for the
            last of several documents. The prompt reuses the cached tokens up to the first that differs.
    """

    ending: str

    def __new__(cls, text: str, ending: str = "") -> Self:
        """Make a document of `text`, which is cached with `ending` after it."""
        made = super().__new__(cls, text)
        made.ending = ending
        return made


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as token ids.

    Attributes:
        head_ids: the tokens before the documents. Empty in a prompt without documents.
        document_ids: one tuple for each document.
        tail_ids: the tokens after the documents: the question and the generation prompt.
        thinking: the generation prompt opens a thinking block, so the answer begins inside it.
        documents: the texts of the cached documents, for the records of their items.
        ending_ids: for each document, the tokens that its cached form has after `document_ids`, and this prompt does
            not. Empty if no document has any.
        between_ids: for each document, the tokens between it and the next. Empty if all documents are adjacent.
        seams: the number of places at which the tokens differ from those of the joined text.
        instruction_length: the number of tokens at the beginning of `head_ids` that come from system messages and
            tools only.
    """

    head_ids: tuple[int, ...]
    document_ids: tuple[tuple[int, ...], ...]
    tail_ids: tuple[int, ...]
    thinking: bool = False
    documents: tuple[str, ...] = ()
    ending_ids: tuple[tuple[int, ...], ...] = ()
    between_ids: tuple[tuple[int, ...], ...] = ()
    seams: int = 0
    instruction_length: int = 0

    @property
    def instruction_ids(self) -> tuple[int, ...]:
        """The tokens of `head_ids` that come from system messages and tools, not from other messages."""
        return self.head_ids[: self.instruction_length]

    @property
    def kept_ids(self) -> tuple[tuple[int, ...], ...]:
        """Each document's tokens in its cached form."""
        return tuple(ids + ending for ids, ending in zip_longest(self.document_ids, self.ending_ids, fillvalue=()))

    @property
    def document_places(self) -> list[range]:
        """The positions of each document's tokens."""
        places, at = list[range](), len(self.head_ids)
        for token_ids, between in zip_longest(self.document_ids, self.between_ids, fillvalue=()):
            places.append(range(at, at + len(token_ids)))
            at += len(token_ids) + len(between)
        return places

    @property
    def context_ids(self) -> tuple[int, ...]:
        """The cacheable part of the prompt: the head, the documents, and the tokens between them."""
        behind = zip_longest(self.document_ids, self.between_ids, fillvalue=())
        return tuple(chain(self.head_ids, *chain.from_iterable(behind)))

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens of the prompt."""
        return self.context_ids + self.tail_ids


class ChatTemplate:
    """A tokenizer's chat template, which accepts more messages than the template itself.

    System messages at the start are joined into one. If the template has no system role, their text opens the first
    user turn. If the template requires alternating roles, consecutive messages of one role are joined. Without a
    template, the prompt is a plain completion: the contents, joined by blank lines.

    Args:
        tokenizer: a Hugging Face tokenizer.
        variables: variables for every rendering of the template, such as `enable_thinking=False`. Without
            `date_string="21 Nov 2026"`, Llama 3's template writes today's date into the head, and yesterday's caches
            no longer match.
        control_tokens: control tokens such as `<|im_end|>` or `<tool_call>` take effect also in the texts of
            documents, users and tools, and in tool definitions. By default they are plain text there, so that a
            document cannot end its turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variables: Mapping[str, Any] | None = None,
        *,
        control_tokens: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})
        self.control_tokens = control_tokens

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a rendered text. Control tokens in it take effect; no special tokens are added.

        Raises:
            InvalidInputError: the text is not Unicode: it contains half of a surrogate pair.
        """
        check_unicode(text)
        pieces = filter(None, text.split(_BREAK))
        return tuple(
            token
            for piece in pieces
            for token in self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        )

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a document or other data, as they are between two lines of text.

        Control tokens in it are plain text.
        """
        return self._between(self._as_data(text), opens=_opens(text), closes=_closes(text))

    def _between(self, text: str, *, opens: bool, closes: bool) -> tuple[int, ...]:
        """Return the token ids of a rendered text after a blank line (if `opens`) and before a word (if `closes`).

        Many tokenizers make other tokens of line breaks at the end of a text than of line breaks before a word, and
        some add a space before the first word of a text.
        """
        before, after = self._line_ids if opens else (), self._word_ids if closes else ()
        ids = self.encode(f"{_LINE if before else ''}{text}{_WORD if after else ''}")
        start, end = len(before), len(ids) - len(after)
        if ids[:start] == before and ids[end:] == after:
            return ids[start:end]
        return self.encode(text)  # the tokenizer merges the text with the line or the word

    @cached_property
    def _line_ids(self) -> tuple[int, ...]:
        return self.encode(_LINE + _WORD)[:-1]

    @cached_property
    def _word_ids(self) -> tuple[int, ...]:
        return self.encode(_LINE + _WORD)[-1:]

    def _as_data(self, text: str, *, said: bool = False) -> str:
        """Return a text with a break inside each control token, so that `encode` does not see the token.

        Args:
            text: the text of a document, a user, a system message or a tool.
            said: the text is the model's own answer, in which markers of tool calls and thinking take effect. Special
                tokens are broken also there: answers leave them out, so the model can only have copied them as text.
        """
        if self.control_tokens:
            return text
        pattern = self._special_pattern if said else self._control_pattern
        broken = pattern.sub(lambda found: f"{found[0][0]}{_BREAK}{found[0][1:]}", text)
        return _BREAK.join(map(self._apart, broken.split(_BREAK))) if self._normalizes and not said else broken

    def _apart(self, text: str) -> str:
        """Add breaks until the tokenizer, which may change the text (such as its case), sees no control token."""
        half = len(text) // 2
        if not half or self.control_ids.isdisjoint(self.tokenizer(text, add_special_tokens=False)["input_ids"]):
            return text
        return f"{self._apart(text[:half])}{_BREAK}{self._apart(text[half:])}"

    def _data_in(self, value: Any) -> Any:
        """Apply `_as_data` to every str in a message's value or a tool's definition."""
        if isinstance(value, str):
            return self._as_data(value)
        if isinstance(value, Mapping):
            return {self._data_in(name): self._data_in(each) for name, each in value.items()}
        return [self._data_in(each) for each in value] if isinstance(value, list | tuple) else value

    @cached_property
    def _added(self) -> dict[str, int]:
        """Token → id for the tokens added to the vocabulary; empty for a server's tokenizer."""
        return {str(token): id for id, token in (getattr(self.tokenizer, "added_tokens_decoder", None) or {}).items()}

    @cached_property
    def _special(self) -> set[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", None) or {}
        special = {str(token) for token in added.values() if getattr(token, "special", False)}
        return special.union(getattr(self.tokenizer, "all_special_tokens", None) or ())

    @cached_property
    def _control(self) -> set[str]:
        """Special tokens, and added tokens that the chat template writes or that look like control tokens.

        Other added tokens, such as runs of spaces or HTML tags, are common in ordinary texts.
        """
        template, looks = str(self.tokenizer.chat_template or ""), re.compile(_LIKE_CONTROL)
        return self._special | {
            token for token in self._added if token.strip() and (token in template or looks.fullmatch(token))
        }

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """The ids of the control tokens, which begin and end turns, tool calls and thinking."""
        return frozenset(id for token, id in self._added.items() if token in self._control)

    @cached_property
    def _normalizes(self) -> bool:
        """Whether the tokenizer looks for control tokens after it normalised the text, for example to lower case."""
        added = getattr(self.tokenizer, "added_tokens_decoder", None) or {}
        return any(str(token) in self._control and getattr(token, "normalized", False) for token in added.values())

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return self._any_of(self._special)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return self._any_of(self._control)

    def _any_of(self, tokens: set[str]) -> re.Pattern[str]:
        """Return a pattern that finds these tokens, and lookalikes if the tokenizer does not list its added tokens."""
        longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, longest_first), "(?!)" if self._added else _LIKE_CONTROL]))

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        seams: Seams = "endings",
    ) -> Prompt:
        """Render and tokenise messages, and split the token ids around the documents.

        Args:
            messages: the conversation. Any message may contain documents.
            tools: tool definitions, for templates that show tools.
            add_generation_prompt: open the assistant's turn.
            seams: `"endings"`: every document has the tokens of its cached form, including its ending. `"documents"`:
                the last document of a group ends where the tokens of the joined text differ from the cached ones.
                `"none"`: the text is tokenised as a whole, and the documents with the text between them are one.

        Raises:
            EmptyPromptError: there are no messages.
            UnsupportedContentError: a content part is not text.
            ChatTemplateError: the template refuses these messages, or does not show each document exactly once.
        """
        normal = [_normal(message) for message in messages]
        if not normal:
            raise EmptyPromptError("there are no messages: pass at least one user message")
        joined = [{**message, "content": "".join(message["content"])} for message in normal]
        system = list(takewhile(lambda message: message["role"] == "system", joined))
        roles, groups = _take_documents(normal)
        text = self._render_open(normal, tools, add_generation_prompt)
        thinking = add_generation_prompt and _thinks(text, normal[-1])
        bos = self.bos_ids
        if not groups:
            return Prompt((), (), bos + self.encode(text), thinking)
        sentinels = [_sentinel(group) for group in range(len(groups))]
        for role, sentinel in zip(roles, sentinels, strict=True):
            if text.count(sentinel) != 1:
                raise ChatTemplateError(
                    f"the chat template shows a {role} message {text.count(sentinel)} times, so documents cannot be "
                    "placed in that message. Put them into another message, or set another chat_template."
                )
        texts = re.split("|".join(sentinels), text)
        head_ids = bos + self._between(texts[0], opens=False, closes=_closes(texts[0]))
        instruction = len(head_ids)
        if roles[0] != "system":
            opening = self.render([*system, _ANYTHING], tools=tools) if system or tools else ""
            instruction = common_length(head_ids, bos + self.encode(opening))
        made = Prompt(head_ids, (), (), thinking, instruction_length=instruction)
        documents = list(chain.from_iterable(groups))
        if seams != "none" or len(documents) == 1:
            made = self._with_documents(made, texts, groups, whole=seams != "endings")
        else:
            made = replace(made, tail_ids=self.encode(texts[-1]))
        if seams == "none":
            shown = self._render_open(joined, tools, add_generation_prompt)
            token_ids = bos + self.encode(shown)
            return made if made.token_ids == token_ids else _split_around(token_ids, made, "".join(documents))
        return made

    def _render_open(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, add_generation_prompt: bool
    ) -> str:
        """`render`, but leave the turn of a last message with `"prefix": True` open, for the model to continue."""
        last = messages[-1]
        if not (add_generation_prompt and last.get("prefix") and last["role"] == "assistant"):
            return self.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        marked = {"role": "assistant", "content": f"{last['content']}{_OPEN_END}"}
        text = self.render([*messages[:-1], marked], tools=tools, add_generation_prompt=False)
        before, found, _ = text.partition(_OPEN_END)
        if not found:
            raise ChatTemplateError(
                "the chat template does not show the last message, which has prefix=True. End with a user message."
            )
        return before

    def _with_documents(
        self, prompt: Prompt, texts: Sequence[str], groups: Sequence[Sequence[Document]], *, whole: bool
    ) -> Prompt:
        """Add the documents to a prompt that has a head and a tail.

        Args:
            prompt: the prompt.
            texts: the rendered texts before, between and after the groups.
            groups: adjacent documents.
            whole: end the last document of a group where the tokens of the joined text differ from the cached ones.
        """
        for number, group in enumerate(groups, start=1):
            before, behind = texts[number - 1 : number + 1]
            closes = number < len(groups) and _closes(behind)
            kept = [f"{document}{document.ending}" for document in group]
            ids = [self.encode_text(text) for text in kept]
            behind_ids, ending = None, tuple[int, ...]()
            if whole:
                last = group[-1]
                rest = self._between(self._as_data(last) + behind, opens=_opens(last), closes=closes)
                if shared := common_length(ids[-1], rest):
                    ids[-1], ending, behind_ids = rest[:shared], ids[-1][shared:], rest[shared:]
                else:
                    kept[-1], ids[-1] = str(last), self.encode_text(last)
            if behind_ids is None:
                behind_ids = self._between(behind, opens=False, closes=closes)
            within = [()] * (len(group) - 1)
            prompt = replace(
                prompt,
                document_ids=(*prompt.document_ids, *ids),
                documents=(*prompt.documents, *kept),
                ending_ids=(*prompt.ending_ids, *within, ending),
                between_ids=(*prompt.between_ids, *within, behind_ids),
                seams=prompt.seams + (self._seams([before, *map(self._as_data, group)]) if whole else 0),
            )
        return replace(prompt, between_ids=prompt.between_ids[:-1], tail_ids=prompt.between_ids[-1])

    def _seams(self, pieces: Sequence[str]) -> int:
        """Count the pairs of adjacent texts whose tokens differ from those of the joined text."""
        seams = 0
        for left, right in pairwise(pieces):
            if left.endswith("\n") and _opens(right):
                continue
            left, right = left[-_SEAM:], right[:_SEAM]
            apart = self._between(left, opens=False, closes=_closes(left))
            apart += self._between(right, opens=_opens(right), closes=False)
            seams += self.encode(left + right) != apart
        return seams

    def verbatim(self, text: str) -> Prompt:
        """Tokenise a text that already has the model's own format; add BOS if the tokenizer does and it is missing.

        Raises:
            EmptyPromptError: the text is empty.
        """
        token_ids, bos = self.encode(text), self._default_bos
        if not token_ids:
            raise EmptyPromptError("the prompt is empty: there is nothing to answer")
        return Prompt((), (), token_ids if token_ids[: len(bos)] == bos else bos + token_ids)

    def split_system(self, instruction: str | None, messages: Sequence[Message]) -> Prompt:
        """Return the head and the tail of a prompt whose system turn is: `instruction`, documents, system messages.

        Args:
            instruction: the text before the documents.
            messages: the conversation. System messages at its start stand after the documents.

        Raises:
            EmptyPromptError: there are only system messages.
            ChatTemplateError: the template refuses these messages.
        """
        opening = [f"{instruction}\n\n"] if instruction else []
        rest = list(messages)
        closing: list[str] = []
        while rest and rest[0].get("role") == "system":
            closing += ["\n\n", *_parts(rest.pop(0))]
        if not rest:
            raise EmptyPromptError("there is no question: pass at least one user message")
        system = {"role": "system", "content": [*opening, Document("…"), *closing]}
        framed = self.prompt([system, *rest])
        return Prompt(framed.head_ids, (), framed.tail_ids, framed.thinking)

    def instruction_ids(self, instruction: str | None) -> tuple[int, ...]:
        """Return the tokens before the documents: the opening of the system turn and `instruction`."""
        return self.split_system(instruction, [_ANYTHING]).head_ids

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Render messages as one text for `encode`, with breaks inside control tokens of users, tools and documents.

        Args:
            messages: the conversation.
            tools: tool definitions, for templates that show tools.
            add_generation_prompt: open the assistant's turn.

        Raises:
            ChatTemplateError: the template refuses the messages, also after consecutive messages of a role are joined.
        """
        joined = _join_leading_system([self._spoken(_normal(message)) for message in messages])
        if not self.has_template:
            return "\n\n".join(message["content"] for message in joined if message["content"])
        if not self.has_system_role:
            joined = _fold_system(joined)
        try:
            return self._apply(joined, tools, add_generation_prompt)
        except TemplateError as refused:
            try:
                return self._apply(_alternate(joined), tools, add_generation_prompt)
            except TemplateError:
                raise ChatTemplateError(
                    f"the chat template refuses these messages ({', '.join(m['role'] for m in joined)}): {refused}"
                ) from refused

    def _spoken(self, message: dict[str, Any]) -> dict[str, Any]:
        """Apply `_as_data` to a message; in the model's own answers, markers of tool calls and thinking take effect."""
        said = message["role"] == "assistant" and isinstance(message["content"], str)
        own = {"content": self._as_data(message["content"], said=True)} if said else {}
        return {name: own[name] if name in own else self._data_in(value) for name, value in message.items()}

    @cached_property
    def generation_ids(self) -> tuple[int, ...]:
        """The tokens that open the assistant's turn, at the end of a prompt."""
        question = [{"role": "user", "content": _PROBE}]
        closed, opened = (self.render(question, add_generation_prompt=opens) for opens in (False, True))
        return self.encode(opened.removeprefix(closed)) if opened.startswith(closed) else ()

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template. Without one, prompts are plain completions."""
        return bool(self.tokenizer.chat_template)

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template renders a system message, exactly once."""
        probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "x"}]
        try:
            return self._apply(probe, None, True).count(_PROBE) == 1
        except TemplateError:
            return False

    @cached_property
    def bos_ids(self) -> tuple[int, ...]:
        """The BOS token of a plain completion; a chat template writes BOS itself."""
        return () if self.has_template else self._default_bos

    @cached_property
    def _default_bos(self) -> tuple[int, ...]:
        """The BOS token, if the tokenizer adds one by default."""
        bos = self.tokenizer.bos_token_id
        return (bos,) if bos is not None and self.tokenizer("x")["input_ids"][:1] == [bos] else ()

    def _apply(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[self._data_in(tool) for tool in tools] if tools else None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.variables,
        )
        return str(text)


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """Return the messages as a list; a str becomes one user message.

    Raises:
        EmptyPromptError: the str is empty.
        InvalidInputError: `prompt` is neither a str nor a list of messages.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise EmptyPromptError("the prompt is empty: there is nothing to answer")
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise InvalidInputError(f"a prompt is a str or a list of messages, not {prompt!r:.80}")
    return [_checked(message) for message in prompt]


def check_unicode(text: str) -> None:
    """Refuse a text with half of a surrogate pair, which can be neither tokenised nor written to a file.

    Raises:
        InvalidInputError: the text contains one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"the text has half of a surrogate pair at character {error.start}, which is not Unicode. Repair it: "
            'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").'
        ) from error


def _checked(message: object) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidInputError(f"a message is a mapping with 'role' and 'content', not {message!r:.80}")
    return message


def _parts(message: Message) -> list[str]:
    """Return a message's content as a list of str, in which `Document`s stay `Document`s."""
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if isinstance(content, Mapping) or not isinstance(content, Iterable):
        raise UnsupportedContentError(f"a message's content is a str or a list of text parts, not {content!r:.80}")
    parts: list[str] = []
    for part in content:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            kind = part.get("type", part) if isinstance(part, Mapping) else type(part).__name__
            raise UnsupportedContentError(
                f"a message has content of type {kind!r}, but a text model reads only text. "
                "Pass {'type': 'text', 'text': …} parts."
            )
    return parts


def _normal(message: Message) -> dict[str, Any]:
    """Return the message with its content as a str, or as a list of str if it contains a `Document`."""
    parts = _parts(_checked(message))
    has_document = any(isinstance(part, Document) for part in parts)
    return {**message, "content": parts if has_document else "".join(parts)}


def _thinks(text: str, last: Message) -> bool:
    """Whether the answer to a rendered prompt begins inside a thinking block."""
    if last.get("prefix"):
        return "<think>" in last["content"] and "</think>" not in last["content"].rpartition("<think>")[2]
    return text.rstrip().endswith("<think>")


def _opens(text: str) -> bool:
    """Whether a text does not change the tokens of a line break before it."""
    return not text[:1].isspace()


def _closes(text: str) -> bool:
    """Whether the tokens at the end of a text may depend on the next text."""
    return text[-1:].isspace()


def _split_around(token_ids: tuple[int, ...], apart: Prompt, document: str) -> Prompt:
    """Split a prompt that was tokenised as a whole: the head and the tail are the longest it shares with `apart`."""
    start = common_length(token_ids, apart.head_ids)
    end = max(start, len(token_ids) - common_length(token_ids[::-1], apart.tail_ids[::-1]))
    documents, texts = ((token_ids[start:end],), (document,)) if end > start else ((), ())
    length = min(start, apart.instruction_length)
    return Prompt(token_ids[:start], documents, token_ids[end:], apart.thinking, texts, instruction_length=length)


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two token sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _sentinel(group: int) -> str:
    """Return the marker of a group of documents in a rendered text."""
    return f"kvcag-documents-{group}-{_SECRET}"


def _take_documents(messages: list[dict[str, Any]]) -> tuple[list[str], list[list[Document]]]:
    """Replace each group of adjacent documents with its sentinel, and join each message's content into a str.

    Returns the role of each group's message, and the groups.
    """
    roles, groups = list[str](), list[list[Document]]()
    for message in messages:
        if isinstance(message["content"], str):
            continue
        shown = list[str]()
        for is_document, parts in groupby(filter(None, message["content"]), lambda part: isinstance(part, Document)):
            if is_document:
                shown.append(_sentinel(len(groups)))
                roles.append(message["role"])
                groups.append(list(parts))
            else:
                shown += parts
        message["content"] = "".join(shown)
    return roles, groups


def _join_leading_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    count = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    if count < 2:
        return messages
    content = "\n\n".join(m["content"] for m in messages[:count] if m["content"])
    return [{**messages[0], "content": content}, *messages[count:]]


def _fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Move the text of system messages to the beginning of the next user turn."""
    folded: list[dict[str, Any]] = []
    for message in messages:
        if folded and folded[-1]["role"] == "system":
            system = folded.pop()["content"]
            if message["role"] == "user":
                message = {**message, "content": f"{system}\n\n{message['content']}"}
            else:
                folded.append({"role": "user", "content": system})
        folded.append(message)
    if folded and folded[-1]["role"] == "system":
        folded[-1] = {"role": "user", "content": folded[-1]["content"]}
    return folded


def _alternate(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join consecutive messages of the same role, except tool results and tool calls."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        plain = message["role"] in ("user", "assistant") and not message.get("tool_calls")
        if plain and joined and joined[-1]["role"] == message["role"] and not joined[-1].get("tool_calls"):
            joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined
