"""ChatKVCAG: a local Hugging Face model as a LangChain chat model that keeps what it has read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing, closing
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from tqdm import tqdm  # type: ignore[import-untyped]

from kvcag.errors import InvalidInputError
from kvcag.langchain.ahead import encode_ahead
from kvcag.langchain.documents_chain import DOCUMENT_SEPARATOR, DocumentsPrompt
from kvcag.langchain.local_model import LocalChatModel
from kvcag.langchain.messages import to_messages
from kvcag.langchain.responses import generation_chunks
from kvcag.langchain.tools import ask, choice_of, parsing, response_format, schema_of
from kvcag.stores.base import SOURCE_FIELDS
from kvcag.streams import in_thread, iterate

_SAMPLING = ("temperature", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_MERGING = ("merge_strategy", "recompute_ratio", "max_kl")
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
_TRACING_ONLY = ("stream", "ls_structured_output_format", "structured_output_format")


class ChatKVCAG(LocalChatModel):
    """A chat model whose documents are encoded once.

    Text blocks of a message are segments that are found again by their content, in any order (see
    `kvcag.langchain.messages`); a prompt without documents reuses the longest prefix that was encoded before, so every
    turn of a chat reuses the last. Making one loads no weights and needs no network.

    ```python
    llm = ChatKVCAG(model="HuggingFaceTB/SmolLM2-135M-Instruct", store="kv/", max_tokens=200)
    llm.invoke("What is the capital of France?").content
    ```
    """

    # --- ahead of the questions --------------------------------------------------------------------------------

    def precompute(
        self,
        documents: Iterable[Document],
        prompt: BasePromptTemplate[Any] | None = None,
        *,
        progress: bool = True,
        **prompt_settings: Any,
    ) -> list[str]:
        """Encode documents before anybody asks, and return the ids under which they are kept.

        Args:
            documents: what a retriever may find. Those that are kept already are not encoded again.
            prompt: the prompt that they will be asked with, as for `create_cag_documents_chain`. With it, the same
                tokens stand before them now as then, which keeps merged answers closer to the model's own; without
                it they are encoded for any prompt.
            progress: show a progress bar.
            **prompt_settings: `document_prompt`, `document_separator` and `document_variable_name`, as for the chain.

        Raises:
            InvalidInputError: something that is not known yet stands before the documents in the prompt.
        """
        listed, steps = self._encoding_ahead(documents, prompt, prompt_settings)
        return list(tqdm(steps(), total=len(listed), desc="encoding", unit="document", disable=not progress))

    async def aprecompute(
        self,
        documents: Iterable[Document],
        prompt: BasePromptTemplate[Any] | None = None,
        *,
        progress: bool = True,
        **prompt_settings: Any,
    ) -> list[str]:
        """`precompute`, in worker threads."""
        listed, steps = self._encoding_ahead(documents, prompt, prompt_settings)
        with tqdm(total=len(listed), desc="encoding", unit="document", disable=not progress) as bar:
            async with aclosing(iterate(steps)) as ids:
                return [id async for id in ids if bar.update() or True]

    def create_context(self, documents: Iterable[Document | str], instruction: str = "") -> str:
        """Encode a corpus whole, and return a short id for it: `llm.bind(cached_content=id)` answers from it.

        Args:
            documents: in the order in which they shall stand.
            instruction: stands before them in the system message; what the system message of a call says stands after.
        """
        listed = list(documents)
        texts = [document if isinstance(document, str) else document.page_content for document in listed]
        known = [document.metadata for document in listed if isinstance(document, Document)]
        sources = [str(each[field]) for each in known for field in SOURCE_FIELDS if each.get(field)]
        return self.memory().create_context(texts, instruction, sources)

    async def acreate_context(self, documents: Iterable[Document | str], instruction: str = "") -> str:
        """`create_context`, in a worker thread."""
        return await in_thread(self.create_context, documents, instruction)

    def _encoding_ahead(
        self, documents: Iterable[Document], prompt: BasePromptTemplate[Any] | None, settings: dict[str, Any]
    ) -> tuple[list[Document], Callable[[], Iterator[str]]]:
        listed = list(documents)
        shown = DocumentsPrompt(prompt=prompt, **settings) if prompt is not None else None
        separator = settings.get("document_separator", DOCUMENT_SEPARATOR)
        return listed, lambda: encode_ahead(self.memory(), listed, shown, separator)

    # --- tools and structured output ---------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: dict[str, Any] | str | bool | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        response_format: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """A model that can call tools. What it writes as a call is held to the tool's schema by a grammar.

        Args:
            tools: functions, LangChain tools, pydantic models, or OpenAI's, Anthropic's or JSON-schema dicts.
            tool_choice: `"auto"` (or None, False) leaves it to the model; `"any"` (or `"required"`, True) makes it
                call one; a name, or OpenAI's or Anthropic's dict, that one; `"none"` none.
            parallel_tool_calls: several calls in one answer. By default only where the model may choose.
            strict: arguments always follow the schema; taken, as other models take it, and never needed.
            response_format: OpenAI's, for an answer that calls no tool.
            **kwargs: further arguments of every call, as `invoke` takes them.

        Raises:
            InvalidInputError: `tool_choice` names no tool, or `response_format` is not understood.
        """
        shown = [convert_to_openai_tool(tool) for tool in tools]
        choice_of(tool_choice, [tool["function"]["name"] for tool in shown])
        schema_of(response_format)
        bound = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls} if shown else {}
        if response_format is not None:
            bound["response_format"] = response_format
        given = {name: value for name, value in bound.items() if value is not None}
        return self.bind(**({"tools": shown} if shown else {}), **given, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """A model whose answers are objects of a schema: the grammar admits nothing else.

        Args:
            schema: a pydantic model (its instances are returned), a TypedDict or a JSON schema (dicts are). None is
                for `"json_mode"`: any JSON object.
            method: `"json_schema"` and `"json_mode"` let the model write the JSON alone; `"function_calling"` as the
                arguments of a call, after it was shown the schema.
            include_raw: return `{"raw": message, "parsed": object, "parsing_error": …}`.
            strict: taken, as other models take it, and never needed.
            **kwargs: further arguments of every call, as `invoke` takes them.

        Raises:
            InvalidInputError: an unknown method, or no schema.
        """
        if method not in ("json_schema", "function_calling", "json_mode"):
            raise InvalidInputError(f"method {method!r} is neither 'json_schema', 'function_calling' nor 'json_mode'")
        if schema is None and method != "json_mode":
            raise InvalidInputError(f"method {method!r} needs a schema: pass a pydantic model, a TypedDict or a dict")
        if method == "function_calling":
            assert schema is not None
            return super().with_structured_output(schema, include_raw=include_raw)
        traced = {"kwargs": {"method": method, "strict": strict}, "schema": schema or {"type": "object"}}
        bound = self.bind(response_format=response_format(schema, method), ls_structured_output_format=traced, **kwargs)
        return parsing(bound, schema, include_raw=include_raw)

    # --- answering ---------------------------------------------------------------------------------------------

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with closing(self._open(messages, stop, kwargs)) as chunks:
            yield from chunks

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with aclosing(iterate(lambda: self._open(messages, stop, kwargs))) as chunks:
            async for chunk in chunks:
                yield chunk

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop=stop, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop=stop, **kwargs))

    def _open(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, given: dict[str, Any]
    ) -> Generator[ChatGenerationChunk, None, None]:
        """Check everything, make the context, and give the answer's chunks. Closing it stops the model."""
        known = ("model", "cached_content", *_SAMPLING, *_MERGING, *_TOOLS)
        unknown = given.keys() - {*known, *_TRACING_ONLY}
        if unknown:
            raise InvalidInputError(
                f"unknown argument {', '.join(sorted(unknown))}. A call takes {', '.join(known)} and stop."
            )
        settings = {name: given.get(name, getattr(self, name)) for name in (*_SAMPLING, *_MERGING)}
        memory = self.memory(given.get("model"))
        strategy, ratio, max_kl = (settings.pop(name) for name in _MERGING)
        stops = stop if stop is not None else self.stop
        sampling = memory.engine.sampling(**settings, stop=stops or None, strip_thinking=self.strip_thinking or None)
        conversation = to_messages(messages)
        if context := given.get("cached_content"):
            conversation = memory.with_context(context, conversation)
        asked = ask(memory.engine.template, conversation, given)
        chunks = memory.stream(
            asked.messages,
            (),
            strategy=strategy,
            ratio=ratio,
            max_kl=max_kl,
            tools=asked.tools,
            sampling=sampling,
            constraint=asked.constraint,
        )
        model_name = given.get("model") or self.model
        return generation_chunks(chunks, model_name, asked.plan, json_answer=given.get("response_format") is not None)
