from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, dynamic_prompt
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.documents import Document
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables.history import RunnableWithMessageHistory
from langgraph.checkpoint.sqlite import SqliteSaver
from pydantic import Field

from kvcag import HFEngine
from kvcag.errors import InvalidInputError, UnsupportedModelError
from kvcag.langchain import ChatKVCAG, KVCAGMiddleware
from tests.unit.langchain.wrapped import WRAPPED

CORPUS = [Document("The tower is tall."), Document("It is red.")]
THREAD: Any = {"configurable": {"thread_id": "1"}}


class ByWord(BaseRetriever):
    """Finds the documents that share a word with the question."""

    documents: list[Document]
    asked: list[str] = Field(default_factory=list)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        self.asked.append(query)
        words = set(query.lower().strip("?").split())
        return [
            document for document in self.documents if words & set(document.page_content.lower().strip(".").split())
        ]


@pytest.fixture
def checkpointer(tmp_path: Path) -> Iterator[SqliteSaver]:
    with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.db")) as saver:
        yield saver


def ask(agent: Any, question: str) -> AIMessage:
    return agent.invoke({"messages": [HumanMessage(question)]}, THREAD)["messages"][-1]


async def test_the_corpus_stands_in_the_system_message(echo: ChatKVCAG) -> None:
    agent = create_agent(echo, system_prompt="Be brief.", middleware=[KVCAGMiddleware(corpus=CORPUS)])
    asked = {"messages": [HumanMessage("How tall?")]}
    expected = "system: Be brief.\n\nThe tower is tall.\n\nIt is red.\n\n\nuser: How tall?"
    assert agent.invoke(asked)["messages"][-1].text == expected
    assert (await agent.ainvoke(asked))["messages"][-1].text == expected


async def test_the_retriever_gets_the_last_question(echo: ChatKVCAG) -> None:
    retriever = ByWord(documents=CORPUS)
    agent = create_agent(echo, middleware=[KVCAGMiddleware(retriever=retriever)])
    first = agent.invoke({"messages": [HumanMessage("is it red?")]})["messages"]
    second = (await agent.ainvoke({"messages": [*first, HumanMessage("how tall?")]}))["messages"]
    assert retriever.asked[-2:] == ["is it red?", "how tall?"]
    assert second[-1].text.startswith("system: The tower is tall.\n\n\n")


def test_every_turn_of_an_agent_reuses_the_corpus_and_the_last_turn(llm: ChatKVCAG, checkpointer: SqliteSaver) -> None:
    agent = create_agent(llm, middleware=[KVCAGMiddleware(corpus=CORPUS)], checkpointer=checkpointer)
    first, second = ask(agent, "How tall?"), ask(agent, "Which colour?")
    report = second.response_metadata["kvcag"]
    assert (report["mode"], report["encoded_tokens"], report["recomputed_tokens"]) == ("prefix", 0, 0)
    # An answer is random bytes here, and may read back as other tokens: the prompt before it is what must hit.
    cached = second.usage_metadata["input_token_details"]["cache_read"]
    assert cached >= first.usage_metadata["input_tokens"]


def test_checkpoints_never_hold_the_documents(llm: ChatKVCAG, checkpointer: SqliteSaver) -> None:
    for settings in ({"corpus": CORPUS}, {"retriever": ByWord(documents=CORPUS)}):
        agent = create_agent(llm, middleware=[KVCAGMiddleware(**settings)], checkpointer=checkpointer)
        ask(agent, "is it tall?")
        kept = [str(agent.get_state(THREAD).values)]
        rows = checkpointer.conn.execute("select checkpoint from checkpoints union all select value from writes")
        kept += [str(row[0]) for row in rows]
        assert any("is it tall?" in text for text in kept)
        assert not any("tower" in text or "tensor" in text for text in kept)


def test_another_agent_goes_on_from_the_checkpoint(tiny_engine: HFEngine, checkpointer: SqliteSaver) -> None:
    def agent() -> Any:
        llm = ChatKVCAG(engine=tiny_engine, max_tokens=8)
        return create_agent(llm, middleware=[KVCAGMiddleware(corpus=CORPUS)], checkpointer=checkpointer)

    ask(agent(), "How tall?")
    answer = ask(agent(), "Which colour?")
    assert answer.response_metadata["kvcag"]["encoded_tokens"] == 0
    assert len(agent().get_state(THREAD).values["messages"]) == 4


def test_a_foreign_model_answers_from_the_text() -> None:
    seen: list[list[BaseMessage]] = []

    class Foreign(GenericFakeChatModel):
        def _generate(self, messages: list[BaseMessage], *given: Any, **more: Any) -> Any:
            seen.append(messages)
            return super()._generate(messages, *given, **more)

    def agent(behavior: Any) -> Any:
        model = Foreign(messages=iter([AIMessage("fine")]))
        middleware = KVCAGMiddleware(corpus=CORPUS, unsupported_model_behavior=behavior)
        return create_agent(model, system_prompt="Be brief.", middleware=[middleware])

    assert ask(agent("ignore"), "How tall?").text == "fine"
    assert seen[0][0].content == "Be brief.\n\nThe tower is tall.\n\nIt is red.\n\n"
    with pytest.warns(UserWarning, match="Foreign does not cache documents and reads all of them"):
        assert ask(agent("warn"), "How tall?").text == "fine"
    with pytest.raises(UnsupportedModelError, match="Use a ChatKVCAG, or set unsupported_model_behavior"):
        ask(agent("raise"), "How tall?")


@pytest.mark.parametrize("wrap", WRAPPED)
async def test_a_wrapped_model_is_recognised(llm: ChatKVCAG, wrap: Any) -> None:
    middleware = KVCAGMiddleware(retriever=ByWord(documents=CORPUS), unsupported_model_behavior="raise")
    agent = create_agent(wrap(llm), middleware=[middleware])
    ask(agent, "is it red or tall?")
    again = (await agent.ainvoke({"messages": [HumanMessage("so tall or red is it?")]}))["messages"][-1]
    assert again.response_metadata["kvcag"]["encoded_tokens"] == 0


async def test_a_middleware_that_replaces_the_system_message_causes_a_warning(
    llm: ChatKVCAG, echo: ChatKVCAG, recwarn: pytest.WarningsRecorder
) -> None:
    """Regression: the documents were silently lost."""

    @dynamic_prompt
    def brief(request: ModelRequest[Any]) -> str:
        return "Be brief."

    ours = KVCAGMiddleware(corpus=CORPUS)
    for model in (llm, echo):
        ask(create_agent(model, middleware=[brief, ours]), "How tall?")
        assert not recwarn
        agent = create_agent(model, middleware=[ours, brief])
        with pytest.warns(UserWarning, match="did not reach the model.*Put KVCAGMiddleware at the end"):
            ask(agent, "How tall?")
        with pytest.warns(UserWarning, match="did not reach the model"):
            await agent.ainvoke({"messages": [HumanMessage("How tall?")]})


def test_a_retriever_that_finds_nothing_leaves_the_request_as_it_is(echo: ChatKVCAG) -> None:
    agent = create_agent(echo, system_prompt="Be brief.", middleware=[KVCAGMiddleware(retriever=ByWord(documents=[]))])
    assert ask(agent, "hm?").text == "system: Be brief.\nuser: hm?"


@pytest.mark.parametrize("both", [{}, {"corpus": CORPUS, "retriever": ByWord(documents=CORPUS)}])
def test_it_takes_a_retriever_or_a_corpus(both: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="one of retriever, corpus and memory"):
        KVCAGMiddleware(**both)


def test_an_unknown_behavior_is_refused() -> None:
    """Regression: an unknown behavior was treated as `ignore`."""
    wrong: Any = "warning"
    with pytest.raises(InvalidInputError, match="unsupported_model_behavior 'warning': use one of ignore, warn, raise"):
        KVCAGMiddleware(corpus=CORPUS, unsupported_model_behavior=wrong)


@pytest.mark.filterwarnings("ignore:.*RunnableWithMessageHistory.*", "ignore:.*ChatMessageHistory.*")
def test_a_chat_with_a_message_history_reuses_every_turn(llm: ChatKVCAG) -> None:
    history = InMemoryChatMessageHistory()
    chat = RunnableWithMessageHistory(llm, lambda: history)
    first, second = chat.invoke("hello", {"configurable": {}}), chat.invoke("and then?", {"configurable": {}})
    assert len(history.messages) == 4
    assert second.usage_metadata["input_token_details"]["cache_read"] >= first.usage_metadata["input_tokens"]
