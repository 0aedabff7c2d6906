"""Shared by the adapters for LangChain and LlamaIndex: models loaded on first use, and the settings of a call."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from os import PathLike, fspath
from typing import Any
from weakref import WeakValueDictionary

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from kvcag.chat_template import ChatTemplate, Message
from kvcag.cube.memory_cube import MemoryCube
from kvcag.engines.base import Engine, Sampling
from kvcag.engines.hf import HFEngine
from kvcag.engines.loading import HUB_ARGUMENTS
from kvcag.errors import InvalidInputError
from kvcag.memory import KVCacheMemory, open_store
from kvcag.stores.base import KVStore
from kvcag.tools import ToolSpec, tool_messages, tool_spec

SAMPLING_SETTINGS = tuple(field.name for field in fields(Sampling) if field.name != "top_logprobs")
"""Settings of an answer that a single call may pass, in addition to `MERGE_SETTINGS`. `top_logprobs` is not among them:
only LangChain returns log-probabilities."""

MERGE_SETTINGS = {"merge_strategy": "strategy", "recompute_ratio": "ratio", "max_kl": "max_kl"}
"""The adapters' names for arguments of `KVCacheMemory.stream`."""


def call_settings(engine: Engine, fields: object, given: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """Return the arguments of `KVCacheMemory.stream` for one call: the call's settings, or else the adapter's fields.

    Args:
        engine: the engine that answers. Its defaults apply to settings that neither the call nor the adapter has.
        fields: the adapter. Its field for the token budget may be `max_tokens` or `max_new_tokens`.
        given: the call's arguments, by the adapters' names.
        **own: further settings of `Sampling` that only this adapter has.

    Raises:
        InvalidInputError: an unknown setting, or a value out of range.
    """
    names = (*MERGE_SETTINGS, *SAMPLING_SETTINGS, "max_tokens")
    unknown = sorted(given.keys() - {*names, "do_sample"})
    if unknown:
        known = sorted([*names, "do_sample", "tools", "tool_choice", "parallel_tool_calls"])
        raise InvalidInputError(f"unknown argument {', '.join(unknown)}. Known arguments: {', '.join(known)}.")
    defaults = {name: getattr(fields, name) for name in names if hasattr(fields, name)}
    settings = _one_budget(defaults) | _one_budget(given) | own
    settings["stop"] = settings["stop"] or None
    merging = {argument: settings.pop(name) for name, argument in MERGE_SETTINGS.items()}
    return {**merging, "sampling": engine.sampling(**settings)}


def _one_budget(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rename `max_tokens` to `max_new_tokens`, its name in `Sampling`."""
    return {"max_new_tokens" if name == "max_tokens" else name: value for name, value in settings.items()}


@contextmanager
def checked_fields() -> Iterator[None]:
    """Turn a `ValidationError` of pydantic into an `InvalidInputError`."""
    try:
        yield
    except ValidationError as error:
        wrong = dict.fromkeys(_problem(found) for found in error.errors())
        raise InvalidInputError("; ".join(wrong)) from error


def _problem(found: ErrorDetails) -> str:
    """Return kvcag's own message if a validator raised one, or else the field and pydantic's message."""
    own = found.get("ctx", {}).get("error")
    return str(own) if own else ": ".join([*map(str, found["loc"][:1]), found["msg"]])


def choice_of(tool_choice: object, names: Sequence[str], *, required: bool = False) -> str:
    """Return `auto`, `any`, `none` or a tool's name, from any form that LangChain's and LlamaIndex's models accept.

    Args:
        tool_choice: one of these strings, or `required`. True means `any`; False and None mean `auto`; a mapping has
            the form of OpenAI or Anthropic.
        names: the tools' names.
        required: the model must call some tool: `auto` then means `any`.

    Raises:
        InvalidInputError: no tool has this name.
    """
    if isinstance(tool_choice, Mapping):
        named = tool_choice.get("function", tool_choice)
        tool_choice = (named.get("name") if isinstance(named, Mapping) else named) or tool_choice.get("type")
    if tool_choice in (None, False, "auto"):
        return "any" if required else "auto"
    if tool_choice is True or (tool_choice in ("any", "required") and tool_choice not in names):
        return "any"
    if tool_choice == "none" or tool_choice in names:
        return str(tool_choice)
    known = ", ".join(names) or "none: no tools are bound"
    raise InvalidInputError(
        f"tool_choice {tool_choice!r} is neither auto, any, none nor a tool's name. Tools: {known}."
    )


def with_tools(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str = "auto",
    parallel: bool = True,
) -> tuple[list[Message], ToolSpec | None]:
    """Return messages that the template can render, and the tools' `ToolSpec`; None if there are no tools.

    Raises:
        InvalidInputError: as for `kvcag.tool_spec`.
    """
    if not tools and choice == "auto" and not any(_is_about_a_call(message) for message in messages):
        return list(messages), None
    spec = tool_spec(template, tools, choice, parallel)
    return (tool_messages(template, messages) if spec is None else spec.messages(messages)), spec


def _is_about_a_call(message: Message) -> bool:
    return message["role"] == "tool" or bool(message.get("tool_calls"))


class LazyMemory:
    """The memory of an adapter. The first call of `memory` loads the model.

    Args:
        model: a hub id or a folder. Not needed with `engine` or `memory`.
        engine: a live engine, in place of a model.
        memory: a `KVCacheMemory` or a `MemoryCube`, in place of an engine, a store and a namespace.
        store: where documents are kept: a `KVStore`, or a folder. None: a store in memory, which all adapters with
            the same engine and namespace share.
        namespace: separates this memory from those of other namespaces.
        **loading: arguments of `HFEngine.from_pretrained`.

    Attributes:
        model: the model's name.
        engine: the engine that was given, or None.
        store: the store that was given.
        namespace: the namespace.

    Raises:
        InvalidInputError: there is no model, or two arguments contradict each other.
    """

    def __init__(
        self,
        model: str | PathLike[str] = "",
        *,
        engine: Engine | None = None,
        memory: KVCacheMemory | MemoryCube | None = None,
        store: KVStore | str | PathLike[str] | None = None,
        namespace: str = "",
        **loading: Any,
    ) -> None:
        self._memory: KVCacheMemory | None = None
        if memory is not None:
            self._memory = _memory_of(memory, engine=engine, store=store, namespace=namespace)
            engine, store, namespace = self._memory.engine, self._memory.store, self._memory.namespace
        if not isinstance(model, str | PathLike):
            raise InvalidInputError(f"model= is a hub id or a folder, not {type(model).__name__}")
        name = fspath(model)
        if engine is None and not name:
            raise InvalidInputError("there is no model. Pass model= (a hub id or a folder) or engine= (a live engine).")
        if engine is not None and name not in ("", engine.model_name):
            raise InvalidInputError(
                f"model= is {name!r}, but the engine's model is {engine.model_name!r}. Pass one of them."
            )
        self.model = name if engine is None else engine.model_name
        self.engine = engine
        self.store = store
        self.namespace = namespace
        self._loading = loading
        self._lazy = LazyEngine.of(name, **loading) if engine is None else None
        self._opening = threading.Lock()

    def drift(self) -> str:
        """Return `KVCacheMemory.drift`, the digest of the learned drift; empty before the model is loaded."""
        return self._memory.drift if self._memory is not None else ""

    def __deepcopy__(self, memo: object) -> LazyMemory:
        """Return the object itself: copies of an adapter share one memory."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments only: the other process loads the model itself.

        Raises:
            InvalidInputError: a live engine, memory or store was passed.
        """
        if self.engine is not None or isinstance(self.store, KVStore):
            raise InvalidInputError(
                "a live engine, memory or store cannot be sent to another process. Pass model=, a hub id or a folder, "
                "and store=, a folder: each process opens them itself."
            )
        opened = partial(LazyMemory, self.model, store=self.store, namespace=self.namespace, **self._loading)
        return opened, ()

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._lazy is None or self._lazy.loaded

    def memory(self) -> KVCacheMemory:
        """Return the memory. The first call loads the weights, and warns if another model made the store's items."""
        with self._opening:
            if self._memory is None:
                engine = self.engine if self.engine is not None else self._lazy_engine.engine()
                store = open_store(self.store, engine, self.namespace)
                self._memory = KVCacheMemory(engine, store, namespace=self.namespace)
                self._memory.documents.warn_if_foreign()
            return self._memory

    def context_length(self) -> int | None:
        """Return the most tokens, prompt and answer together; None if the configuration was not downloaded yet."""
        return self.engine.context_length if self.engine is not None else self._lazy_engine.context_length()

    def template(self) -> ChatTemplate:
        """Return the model's chat template, without loading the weights."""
        return self.engine.template if self.engine is not None else self._lazy_engine.template()

    @property
    def _lazy_engine(self) -> LazyEngine:
        assert self._lazy is not None  # callers use it only where `engine` is None
        return self._lazy


class LazyEngine:
    """A model that is loaded on first use, once for all callers with the same settings: see `of`.

    Args:
        model: a hub id or a folder.
        settings: further arguments of `HFEngine.from_pretrained`.
    """

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        self.model = model
        self._settings = settings
        self._hub = {name: settings[name] for name in HUB_ARGUMENTS if name in settings}
        self._loading = threading.Lock()
        self._engine: HFEngine | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def of(cls, model: str, **settings: Any) -> LazyEngine:
        """Return the same object for the same settings, as long as a caller holds it. None and `{}` count as unset."""
        given = {name: value for name, value in settings.items() if value is not None and value != {}}
        key = json.dumps([model, given], sort_keys=True, default=repr)
        with _lock:
            found = _lazy.get(key)
            if found is None:
                found = _lazy[key] = cls(model, given)
            return found

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._engine is not None

    def engine(self) -> HFEngine:
        """Return the engine. The first call loads the model."""
        with self._loading:
            if self._engine is None:
                self._engine = HFEngine.from_pretrained(self.model, **self._settings)
            return self._engine

    def context_length(self) -> int | None:
        """Return the most tokens, prompt and answer together; None if the configuration was not downloaded yet."""
        if self._engine is not None:
            return self._engine.context_length
        try:
            config = AutoConfig.from_pretrained(self.model, **{**self._hub, "local_files_only": True})
        except OSError:
            return None
        length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        return None if length is None else int(length)

    def template(self) -> ChatTemplate:
        """Return the chat template, without loading the weights."""
        if self._engine is not None:
            return self._engine.template
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.model, **self._hub)
        return ChatTemplate(self._tokenizer, self._settings.get("template_variables"))


_lazy: WeakValueDictionary[str, LazyEngine] = WeakValueDictionary()
_lock = threading.Lock()


def _memory_of(memory: KVCacheMemory | MemoryCube, **given: object) -> KVCacheMemory:
    """Return the memory passed as `memory=`. Refuses an engine, store or namespace that is not this memory's own."""
    if not isinstance(memory, KVCacheMemory | MemoryCube):
        raise InvalidInputError(f"memory= is a MemoryCube or a KVCacheMemory, not a {type(memory).__name__}")
    found = memory.memory if isinstance(memory, MemoryCube) else memory
    others = [name for name, value in given.items() if value not in (None, "") and value != getattr(found, name)]
    if others:
        raise InvalidInputError(f"memory= has its own {', '.join(given)}. Leave out {', '.join(others)}.")
    return found
