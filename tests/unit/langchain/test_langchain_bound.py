"""A context that is bound to a model reaches every runnable that is made from the model."""

from __future__ import annotations

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate

from kvcag import HFEngine
from kvcag.langchain import ChatKVCAG, create_cag_documents_chain
from kvcag.testing import byte_tokenizer, tiny_model
from tests.unit.langchain.wrapped import WRAPPED


@pytest.fixture(scope="module")
def corpus() -> tuple[ChatKVCAG, str, int]:
    """A model, the id of a context, and the minimum number of tokens of a question with this context."""
    llm = ChatKVCAG(engine=HFEngine(tiny_model(), byte_tokenizer()), max_tokens=60)
    context = llm.create_context(["The Eiffel tower is 330 metres tall. " * 5])
    return llm, context, llm.invoke("How tall?", cached_content=context).usage_metadata["input_tokens"]


def names(order: str) -> list[Any]:
    """The wrappers, each with the context bound before or after wrapping."""
    return [pytest.param(wrap.values[0], order == "first", id=f"{wrap.id}, bound {order}") for wrap in WRAPPED]


@pytest.mark.parametrize(("wrap", "first"), [*names("first"), *names("last")])
def test_a_bound_context_survives_tools_structured_output_and_agents(
    corpus: tuple[ChatKVCAG, str, int], wrap: Any, first: bool
) -> None:
    """Regression: LangChain drops bound arguments, so the corpus was silently lost."""
    llm, context, size = corpus
    bound = wrap(llm.bind(cached_content=context)) if first else wrap(llm).bind(cached_content=context)

    def tool(place: str) -> str:
        """Looks a place up."""
        return place

    schema = {
        "title": "Height",
        "type": "object",
        "properties": {"metres": {"type": "integer"}},
        "required": ["metres"],
    }
    for made in (bound, bound.bind(stop=["zz"])):
        assert made.invoke("How tall?").usage_metadata["input_tokens"] >= size
    if not hasattr(bound, "bind_tools"):  # LangChain's `RunnableRetry` has no method of the model's
        return
    for made in (bound.bind_tools([tool]), bound.bind(stop=["zz"]).bind_tools([tool])):
        assert made.invoke("How tall?").usage_metadata["input_tokens"] >= size
    raw = bound.with_structured_output(schema, include_raw=True).invoke("How tall?")["raw"]
    assert raw.usage_metadata["input_tokens"] >= size
    said = create_agent(bound, [tool]).invoke({"messages": [("human", "How tall?")]})["messages"]
    assert said[1].usage_metadata["input_tokens"] >= size


@pytest.mark.parametrize("include_raw", [True, False])
async def test_a_context_bound_to_structured_output_is_read(
    corpus: tuple[ChatKVCAG, str, int], include_raw: bool
) -> None:
    """Regression: with `include_raw`, bound arguments were lost."""
    llm, context, size = corpus
    schema = {"title": "Height", "type": "object", "properties": {}}
    structured = llm.with_structured_output(schema, include_raw=include_raw).bind(cached_content=context)
    handler = UsageMetadataCallbackHandler()
    structured.invoke("How tall?", {"callbacks": [handler]})
    await structured.ainvoke("How tall?", {"callbacks": [handler]})
    list(structured.stream("How tall?", {"callbacks": [handler]}))
    [usage] = handler.usage_metadata.values()
    assert usage["input_tokens"] >= 3 * size


async def test_a_context_bound_to_a_chain_that_begins_with_our_prompt_is_said_to_be_lost(
    corpus: tuple[ChatKVCAG, str, int],
) -> None:
    """LangChain passes arguments that are bound to a chain to its first step only."""
    llm, context, _ = corpus
    prompt = ChatPromptTemplate.from_messages([("system", "Use:\n\n{context}"), ("human", "{input}")])
    chain = create_cag_documents_chain(llm, prompt)
    given = {"context": [Document("It is red.")], "input": "How tall?"}
    with pytest.warns(UserWarning, match="cached_content is bound to the chain and does not reach the model.*llm.bind"):
        chain.bind(cached_content=context).invoke(given)
    with pytest.warns(UserWarning, match="does not reach the model"):
        await chain.bind(stop=["x"]).ainvoke(given)
    with pytest.warns(UserWarning, match="does not reach the model"):
        list(chain.bind(stop=["x"]).stream(given))
