"""Conversion between LangChain's messages, tools and answers, and kvcag's."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import blake2b
from operator import itemgetter
from typing import Any, TypeVar

from langchain_core.documents import Document as LangChainDocument
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import ToolCallChunk, tool_call_chunk
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGenerationChunk
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.json import parse_partial_json
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel
from pydantic.errors import PydanticUserError

from kvcag.adapters import choice_of, with_tools
from kvcag.chat_template import ChatTemplate, Document, Message, segment
from kvcag.core import Chunk, Usage
from kvcag.engines.constrain import ConstraintLike, Grammar, JsonSchema, close_objects
from kvcag.errors import InvalidInputError, UnsupportedContentError
from kvcag.tools import CallParser, Parsed, ToolCall, ToolSpec

_NOTE = "kvcag_documents"
"""A key in `additional_kwargs`. It holds, for each document block, a digest of its text, and the ending that its cache
contains after that text. Other chat models do not send this key to their server; some would refuse a mark within the
blocks. Digests stay right where indices would not: `merge_message_runs` joins messages, `trim_messages` cuts them."""

_OWN_BLOCKS = {
    "tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call",  # repeated in tool_calls
    "reasoning", "thinking", "redacted_thinking", "non_standard",  # not part of the answer
}  # fmt: skip

MessageT = TypeVar("MessageT", bound=BaseMessage)


# --- documents in messages ---------------------------------------------------------------------------------------


def with_documents(
    message: MessageT, before: str, documents: Sequence[str], after: str = "", *, ending: str = ""
) -> MessageT:
    """A copy of the message whose content is `before`, a text block for each document, and `after`.

    The cache of the last document contains `ending` after its text; the message does not.
    """
    texts = [(before, False), *((document, True) for document in documents), (after, False)]
    shown = [(text, is_document) for text, is_document in texts if text]
    noted = [[_digest(text), ""] for text in documents if text]
    if noted:
        noted[-1][1] = ending
    return message.model_copy(
        update={
            "content": [{"type": "text", "text": text} for text, _ in shown] or "",
            "additional_kwargs": {**message.additional_kwargs, _NOTE: noted},
        }
    )


def noted_documents(message: BaseMessage) -> dict[int, str] | None:
    """The endings of the document blocks that `with_documents` wrote, by block index.

    Returns None for a message that `with_documents` did not write.
    """
    if _NOTE not in message.additional_kwargs:
        return None
    endings = dict(message.additional_kwargs[_NOTE])
    digests = (_digest(text) if (text := _shown(block)) else "" for block in _blocks(message))
    return {index: endings[digest] for index, digest in enumerate(digests) if digest in endings}


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


# --- messages for the engine -------------------------------------------------------------------------------------


def to_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """Convert LangChain messages to the messages that `KVCacheMemory.stream` takes.

    In system, human and tool messages, these blocks are documents: those that `with_documents` wrote, `text-plain`
    blocks, and blocks with a `cache_control`. If no message has such a block, all blocks of a system message with more
    than one are documents. In a tool message without such blocks, the documents of its artifact are documents.

    Raises:
        UnsupportedContentError: a message holds an image, audio, a file or another block that is not text.
        InvalidInputError: a message is not a system, human, AI, tool, function or chat message.
    """
    marked = any(noted_documents(message) is not None or any(_marks(message)) for message in messages)
    return [{**_frame(message), "content": _content(message, marked)} for message in messages]


def _frame(message: BaseMessage) -> dict[str, Any]:
    """The role, name and tool calls of a message: everything except its content."""
    if isinstance(message, SystemMessage):
        return {"role": "system"}
    if isinstance(message, HumanMessage):
        return {"role": "user", **({"name": message.name} if message.name else {})}
    if isinstance(message, AIMessage):
        calls = [
            {"type": "function", "id": call["id"], "function": {"name": call["name"], "arguments": call["args"]}}
            for call in message.tool_calls
        ]
        return {"role": "assistant", **({"tool_calls": calls} if calls else {})}
    if isinstance(message, ToolMessage):
        return {"role": "tool", "tool_call_id": message.tool_call_id, "name": message.name}
    if isinstance(message, FunctionMessage):
        return {"role": "tool", "name": message.name}
    if isinstance(message, ChatMessage):
        return {"role": message.role}
    raise InvalidInputError(
        f"a {type(message).__name__} cannot be part of a conversation: pass system, human, AI and tool messages"
    )


def _content(message: BaseMessage, marked: bool) -> str | list[str]:
    """The text, or a list of texts and documents."""
    blocks = _blocks(message)
    texts = [_text(block, message) for block in blocks]
    if isinstance(message, ToolMessage) and not any(_marks(message)):
        return _with_artifact("".join(texts), message.artifact)
    if not isinstance(message, SystemMessage | HumanMessage | ToolMessage):
        return "".join(texts)
    in_system = len(texts) > 1 and isinstance(message, SystemMessage)
    documents = _marks(message) if marked else [in_system] * len(texts)
    if not any(documents):
        return "".join(texts)
    endings = noted_documents(message) or {}
    parts = enumerate(zip(texts, documents, strict=True))
    return [Document(text, endings.get(at, "")) if document else text for at, (text, document) in parts]


def _with_artifact(text: str, artifact: object) -> str | list[str]:
    """Split a tool's result into text and documents: those documents of its artifact whose text the result contains."""
    found, at = list[str](), 0
    for document in artifact if isinstance(artifact, list | tuple) else ():
        content = document.page_content if isinstance(document, LangChainDocument) else ""
        start = text.find(content, at) if content.strip() else -1
        if start < 0:
            continue
        kept = segment(content)
        shown = kept if text.startswith(kept, start) else content
        found += [text[at:start], Document(shown, kept[len(shown) :])]
        at = start + len(shown)
    return [*found, text[at:]] if found else text


def _blocks(message: BaseMessage) -> list[str | dict[str, Any]]:
    """The content as a list, without the blocks of an AI message that are not text."""
    content: list[Any] = [message.content] if isinstance(message.content, str) else list(message.content)
    if isinstance(message, AIMessage):
        return [block for block in content if isinstance(block, str) or block.get("type") not in _OWN_BLOCKS]
    return content


def _marks(message: BaseMessage) -> list[bool]:
    """For each block, whether it is marked as a document."""
    noted = noted_documents(message) or {}
    return [index in noted or _is_marked(block) for index, block in enumerate(_blocks(message))]


def _is_marked(block: str | Mapping[str, Any]) -> bool:
    if not isinstance(block, Mapping):
        return False
    extras = block.get("extras") or {}  # LangChain's block constructors put unknown keys here
    return block.get("type") == "text-plain" or bool(block.get("cache_control") or extras.get("cache_control"))


def _shown(block: str | Mapping[str, Any]) -> str | None:
    """The text of a text block; None for a block of another type."""
    if isinstance(block, str):
        return block
    text = block.get("text") if block.get("type") in ("text", "text-plain") else None
    return text if isinstance(text, str) else None


def _text(block: str | Mapping[str, Any], message: BaseMessage) -> str:
    text = _shown(block)
    if text is not None:
        return text
    kind = None if isinstance(block, str) else block.get("type")
    raise UnsupportedContentError(
        f"the {message.type} message contains a block of type {kind!r}, and a text model reads text only. "
        'Pass {"type": "text", "text": …} blocks, or use a model that accepts this content.'
    )


# --- answers for LangChain ---------------------------------------------------------------------------------------


def generation_chunks(
    chunks: Generator[Chunk, None, None], model_name: str, plan: ToolSpec | None = None, *, json_answer: bool = False
) -> Generator[ChatGenerationChunk, None, None]:
    """An answer as LangChain chunks. Only the last chunk has usage, the finish reason and the model's name.

    Args:
        chunks: the engine's chunks. Closing this generator closes them.
        model_name: written into the last chunk's `response_metadata`.
        plan: the tools that the answer may call.
        json_answer: read an answer that calls no tool as JSON, and not as an invalid call.
    """
    parser = plan.parser() if plan else None
    streamed = _CallStream(parser, {tool.name for tool in plan.offered}) if parser and plan else None
    written = shown = ""
    with closing(chunks):
        for chunk in chunks:
            text = parser.push(chunk.text) if parser else chunk.text
            written, shown = written + chunk.text, shown + text
            if chunk.usage is None:
                begun = streamed.push(shown) if streamed and not json_answer else []
                # An empty chunk is sent, too: the reader can close the stream after every step.
                message = AIMessageChunk(content=text, tool_call_chunks=begun, response_metadata=_logprobs(chunk))
                yield ChatGenerationChunk(message=message)
                continue
            calls: list[ToolCallChunk] = []
            if parser and streamed:
                parsed = parser.close()
                if json_answer and not parsed.calls:
                    text += written[len(shown) :]
                else:
                    text += parser.rest
                    calls = streamed.close(parsed, shown + text)
            finish: str | None = chunk.finish_reason
            if streamed and streamed.begun and finish == "stop":
                finish = "tool_calls"
            last = _last(chunk.usage, text, calls, model_name, finish)
            last.response_metadata |= _logprobs(chunk)
            yield ChatGenerationChunk(message=last)


def _last(
    usage: Usage, text: str, calls: list[ToolCallChunk], model_name: str, finish_reason: str | None
) -> AIMessageChunk:
    return AIMessageChunk(
        content=text,
        tool_call_chunks=calls,
        usage_metadata=_usage_metadata(usage),
        response_metadata={
            "model_name": model_name,
            "model_provider": "kvcag",
            "finish_reason": finish_reason,
            "kvcag": _report(usage),
        },
        chunk_position="last",
    )


def _logprobs(chunk: Chunk) -> dict[str, Any]:
    """The log-probabilities of a chunk's token in OpenAI's form; empty if none were requested."""
    if not chunk.scores:
        return {}
    said, *likeliest = ({"token": score.text, "logprob": score.logprob} for score in chunk.scores)
    return {"logprobs": {"content": [{**said, "top_logprobs": likeliest}]}}


class _CallStream:
    """Tool calls as chunks: first the name and the id, then the arguments as they are written.

    Args:
        parser: parses the answer.
        names: the names of the offered tools.

    Attributes:
        begun: a chunk of a call was made.
    """

    def __init__(self, parser: CallParser, names: Set[str]) -> None:
        self._parser = parser
        self._names = names
        self._sent: list[str] = []
        self._first = 0
        self.begun = False

    def push(self, shown: str) -> list[ToolCallChunk]:
        """The parts of the calls that were written since the last push."""
        chunks = []
        for at, (name, arguments) in enumerate(self._parser.written()):
            if name not in self._names or not arguments.startswith("{"):
                break
            if at == len(self._sent):
                self._first = self._first if at else int(bool(shown))
                chunks.append(self._chunk(at, name, arguments, ToolCall(name, {}).id))
                self._sent.append(arguments)
            elif arguments != self._sent[at]:
                chunks.append(self._chunk(at, None, arguments[len(self._sent[at]) :]))
                self._sent[at] = arguments
        return chunks

    def close(self, parsed: Parsed, shown: str) -> list[ToolCallChunk]:
        """The remaining parts of the calls, and the invalid calls."""
        chunks, begun = self.push(shown), len(self._sent)
        invalid = list(parsed.invalid_calls)
        for at in range(len(parsed.calls), begun):  # at most the last call, if the answer was cut off within it
            error = invalid.pop(0).error if invalid else "cut off"
            chunks.append(self._chunk(at, None, f"{_breaking(self._sent[at])} {error}"))
        rest = [(call.name, json.dumps(call.arguments, ensure_ascii=False), call.id) for call in parsed.calls[begun:]]
        # The error stands before an invalid call's text: LangChain would complete text that begins as JSON.
        rest += [(call.name or "", f"{call.error}: {call.text}", call.id) for call in invalid]
        self._first = self._first if begun else int(bool(shown))
        return chunks + [self._chunk(at, *call) for at, call in enumerate(rest, start=begun)]

    def _chunk(self, at: int, name: str | None, arguments: str, id: str | None = None) -> ToolCallChunk:
        self.begun = True
        return tool_call_chunk(name=name, args=arguments, id=id, index=self._first + at)


def _breaking(text: str) -> str:
    """An ending that makes cut JSON invalid: LangChain would complete it, and call with half of the arguments."""
    endings = ("]", "}", '"]', '"}', '""]', '""}')
    return next(ending for ending in endings if not isinstance(_completed(text + ending), dict))


def _completed(text: str) -> Any:
    try:
        return parse_partial_json(text)
    except ValueError:
        return None


def _usage_metadata(usage: Usage) -> UsageMetadata:
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "input_token_details": {"cache_read": usage.cached_tokens, "cache_creation": usage.created_tokens},
    }


def _report(usage: Usage) -> dict[str, Any]:
    """How the context was made: token counts, names, seconds. Without documents, counts cover the whole prompt."""
    made = (
        usage.context.as_dict()
        if usage.context
        else {
            "mode": "prefix" if usage.cached_tokens else "encoded",
            "is_exact": True,
            "reused_tokens": usage.cached_tokens,
            "recomputed_tokens": 0,
            "encoded_tokens": usage.prompt_tokens - usage.cached_tokens,
        }
    )
    return {**made, "ttft_s": usage.ttft_s, "total_s": usage.total_s}


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation as the model reads it, and the constraint on its answer."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    constraint: ConstraintLike | None
    plan: ToolSpec | None


def ask(template: ChatTemplate, messages: Sequence[Message], given: Mapping[str, Any]) -> Asked:
    """Prepare messages with the bound `tools`, `tool_choice`, `parallel_tool_calls` and `response_format`.

    If none is bound and the last message is the model's, the model continues that message.
    """
    tools = shown_tools(given.get("tools") or [])
    choice = choice_of(given.get("tool_choice"), [tool["function"]["name"] for tool in tools])
    parallel = given.get("parallel_tool_calls")
    parallel = choice == "auto" if parallel is None else parallel
    shown, plan = with_tools(template, messages, tools, choice, parallel)
    schema = schema_of(given.get("response_format"))
    answer = None if schema is None else JsonSchema(schema, closed=True)
    if plan is None:
        if answer is None and shown and shown[-1]["role"] == "assistant" and messages[-1].get("content"):
            shown = [*shown[:-1], {**shown[-1], "prefix": not messages[-1].get("tool_calls")}]
        return Asked(shown, None, answer, None)
    constraint = plan.constraint if answer is None or plan.forced else _calls_or(answer, plan)
    return Asked(shown, plan.tools, constraint, plan)


def shown_tools(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """Convert tools to OpenAI's form.

    Raises:
        InvalidInputError: a tool has an unknown form, or runs on a provider's server.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise InvalidInputError(f"tools is {tools!r:.80}: pass a list of tools")
    shown = []
    for tool in tools:
        try:
            made = convert_to_openai_tool(tool)
        except (TypeError, ValueError, LookupError, PydanticUserError) as error:
            raise InvalidInputError(f"{tool!r:.80} is not a tool: {error}") from error
        if "function" not in made:
            raise InvalidInputError(
                f"{made.get('type')!r} is a tool that runs on a provider's server, which ChatKVCAG does not have. "
                "Pass a function, a LangChain tool, a pydantic model or a JSON schema."
            )
        if not isinstance(made["function"], Mapping) or not isinstance(made["function"].get("name"), str):
            raise InvalidInputError(f"{tool!r:.80} is not a tool: its function has no name")
        shown.append(made)
    return shown


def schema_of(response_format: Any) -> dict[str, Any] | None:
    """The JSON schema of OpenAI's `response_format`; None if the answer is free text.

    Raises:
        InvalidInputError: `response_format` has an unknown form.
    """
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if response_format is None or kind == "text":
        return None
    holder = response_format.get("json_schema") if kind == "json_schema" else response_format
    schema = holder.get("schema", {} if kind == "json_object" else None) if isinstance(holder, Mapping) else None
    if not isinstance(schema, Mapping) or kind not in ("json_schema", "json_object"):
        raise InvalidInputError(
            f"response_format {str(response_format)[:80]!r} has an unknown form: pass {{'type': 'json_schema', "
            "'json_schema': {'name': …, 'schema': …}}, {'type': 'json_object'}, or use with_structured_output(schema)."
        )
    return {"type": "object", **schema} if kind == "json_object" else dict(schema)


def response_format(schema: Any, method: str) -> dict[str, Any]:
    """OpenAI's `response_format` for a pydantic model, a TypedDict or a JSON schema.

    Raises:
        InvalidInputError: the schema has an unknown form.
    """
    if method == "json_mode" and schema is None:
        return {"type": "json_object"}
    try:
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            shown: Mapping[str, Any] = schema.model_json_schema()
        elif isinstance(schema, Mapping) and ("properties" in schema or "$ref" in schema or "anyOf" in schema):
            shown = schema
        else:
            shown = convert_to_json_schema(schema)
    except (TypeError, ValueError, LookupError, PydanticUserError) as error:
        raise InvalidInputError(f"{schema!r:.80} is not a schema: {error}") from error
    if method == "json_mode":
        return {"type": "json_object", "schema": dict(shown)}
    return {"type": "json_schema", "json_schema": {"name": shown.get("title", "answer"), "schema": dict(shown)}}


def json_parser(schema: Any) -> BaseOutputParser[Any]:
    """A parser that reads a JSON answer into an instance of a pydantic model, or else into a dict."""
    is_model = isinstance(schema, type) and is_basemodel_subclass(schema)
    return PydanticOutputParser(pydantic_object=schema) if is_model else JsonOutputParser()


def call_parser(schema: Any) -> BaseOutputParser[Any]:
    """As `json_parser`, for the arguments of a call of the tool that the schema describes."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    [tool] = shown_tools([schema])
    return JsonOutputKeyToolsParser(key_name=tool["function"]["name"], first_tool_only=True)


def parsing(
    llm: Runnable[LanguageModelInput, Any], parser: BaseOutputParser[Any], *, include_raw: bool
) -> Runnable[LanguageModelInput, Any]:
    """Parse the model's answer. With `include_raw`, also return the message and the parsing error."""
    if not include_raw:
        return llm | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    parsed_or_not: Runnable[Any, Any] = parsed.with_fallbacks([failed], exception_key="parsing_error")
    raw = RunnableMap(raw=RunnablePassthrough[Any]())  # after the model: a map does not pass on bound arguments
    return llm | raw | parsed_or_not


def _calls_or(answer: JsonSchema, plan: ToolSpec) -> Grammar:
    """A grammar that accepts either tool calls or an answer that follows the schema."""
    calls = replace(plan, forced=True).constraint.lark.removeprefix("start:")
    schema = {**close_objects(answer.schema), "x-guidance": {"whitespace_flexible": False}}
    return Grammar(f"start: answer | calls\ncalls:{calls}\nanswer: %json {json.dumps(schema, ensure_ascii=False)}")
