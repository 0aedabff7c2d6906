"""Runnables made from a chat model that keep its corpus, which LangChain drops with every bound argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage
from langchain_core.runnables import (
    ConfigurableField,
    Runnable,
    RunnableBinding,
    RunnableConfig,
    RunnableSerializable,
    RunnableWithFallbacks,
)
from langchain_core.runnables.configurable import RunnableConfigurableAlternatives, RunnableConfigurableFields
from langchain_core.runnables.retry import RunnableRetry


class KeepsContext(RunnableSerializable[LanguageModelInput, AIMessage]):
    """A `ChatKVCAG`, or a runnable around one, whose `bind(cached_content=id)` sets the model's field.

    LangChain drops bound arguments in `bind_tools`, `with_structured_output` and agents (langchain#30983); a field
    stays. So the methods below return runnables of this class, too.
    """

    @classmethod
    def lc_id(cls) -> list[str]:
        """What `langchain_core.load.dumps` writes: the name of LangChain's own class."""
        return next((core.lc_id() for core, ours in _OURS.items() if issubclass(cls, ours)), super().lc_id())

    def _with_context(self, context: str | None) -> Any:
        """A copy that answers from a context of `create_context`."""
        return self.model_copy(update={"cached_content": context})

    def bind(self, **kwargs: Any) -> Any:
        """`Runnable.bind`. `cached_content` becomes a field of a copy of the model."""
        if "cached_content" not in kwargs:
            return _keeping(super().bind(**kwargs))
        made = self._with_context(kwargs.pop("cached_content"))
        return made.bind(**kwargs) if kwargs else made

    def with_config(self, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """`Runnable.with_config`."""
        return _keeping(super().with_config(config, **kwargs))

    def with_listeners(self, **kwargs: Any) -> Any:
        """`Runnable.with_listeners`."""
        return _keeping(super().with_listeners(**kwargs))

    def with_alisteners(self, **kwargs: Any) -> Any:
        """`Runnable.with_alisteners`."""
        return _keeping(super().with_alisteners(**kwargs))

    def with_types(self, *args: Any, **kwargs: Any) -> Any:
        """`Runnable.with_types`."""
        return _keeping(super().with_types(*args, **kwargs))

    def with_retry(self, **kwargs: Any) -> Any:
        """`Runnable.with_retry`."""
        return _keeping(super().with_retry(**kwargs))

    def with_fallbacks(self, fallbacks: Sequence[Runnable[Any, Any]], **kwargs: Any) -> Any:
        """`Runnable.with_fallbacks`."""
        return _keeping(super().with_fallbacks(fallbacks, **kwargs))

    def configurable_fields(self, **kwargs: Any) -> Any:
        """`RunnableSerializable.configurable_fields`."""
        return _keeping(super().configurable_fields(**kwargs))

    def configurable_alternatives(self, which: ConfigurableField, **kwargs: Any) -> Any:
        """`RunnableSerializable.configurable_alternatives`."""
        return _keeping(super().configurable_alternatives(which, **kwargs))


class _Binding(KeepsContext, RunnableBinding[LanguageModelInput, AIMessage]):
    def _with_context(self, context: str | None) -> Any:
        return self.model_copy(update={"bound": _answering_from(self.bound, context)})


class _Retry(KeepsContext, RunnableRetry[LanguageModelInput, AIMessage]):
    def _with_context(self, context: str | None) -> Any:
        return self.model_copy(update={"bound": _answering_from(self.bound, context)})


class _Fallbacks(KeepsContext, RunnableWithFallbacks[LanguageModelInput, AIMessage]):
    def _with_context(self, context: str | None) -> Any:
        others = [_answering_from(fallback, context) for fallback in self.fallbacks]
        return self.model_copy(update={"runnable": _answering_from(self.runnable, context), "fallbacks": others})


class _Fields(KeepsContext, RunnableConfigurableFields[LanguageModelInput, AIMessage]):
    def _with_context(self, context: str | None) -> Any:
        return self.model_copy(update={"default": _answering_from(self.default, context)})


class _Alternatives(KeepsContext, RunnableConfigurableAlternatives[LanguageModelInput, AIMessage]):
    def _with_context(self, context: str | None) -> Any:
        others = {name: _answering_from(other, context) for name, other in self.alternatives.items()}
        return self.model_copy(update={"default": _answering_from(self.default, context), "alternatives": others})


_OURS: dict[type[Any], type[Any]] = {
    RunnableBinding: _Binding,
    RunnableRetry: _Retry,
    RunnableWithFallbacks: _Fallbacks,
    RunnableConfigurableFields: _Fields,
    RunnableConfigurableAlternatives: _Alternatives,
}
"""LangChain's wrappers, and those of this module."""


def _keeping(made: Any) -> Any:
    """LangChain's wrapper as ours."""
    if isinstance(made, KeepsContext):
        return made
    ours = next((ours for core, ours in _OURS.items() if isinstance(made, core)), None)
    return ours.model_construct(**dict(made)) if ours else made


def _answering_from(runnable: Any, context: str | None) -> Any:
    """A runnable that answers from the context, where it is around a `ChatKVCAG`. An alternative may be a function."""
    if isinstance(runnable, KeepsContext):
        return runnable._with_context(context)
    return runnable if isinstance(runnable, Runnable) else partial(_made, runnable, context)


def _made(make: Callable[[], Any], context: str | None) -> Any:
    return _answering_from(make(), context)
