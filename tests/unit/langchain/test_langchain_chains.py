from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough

from kvcag import CacheWarning, HFEngine
from kvcag.errors import ContextLengthError, EmptyPromptError, InvalidInputError
from kvcag.langchain import ChatKVCAG, create_cag_documents_chain
from kvcag.testing import byte_tokenizer, tiny_model
from tests.unit.langchain.wrapped import WRAPPED
from tests.vocabularies import TRAINED, tokenizer_of

PROMPT = ChatPromptTemplate.from_messages([("system", "Use:\n\n{context}"), ("human", "{input}")])
DOCUMENTS = [Document("The tower is tall.", metadata={"source": "a"}), Document("It is red.", metadata={"source": "b"})]


class Fixed(BaseRetriever):
    """Finds the same documents for every question."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self.documents


@pytest.fixture
def smollm_like() -> ChatKVCAG:
    tokenizer = tokenizer_of("gpt2")
    return ChatKVCAG(engine=HFEngine(tiny_model(vocab_size=tokenizer.vocab_size + 8), tokenizer), max_tokens=4)


class Identity:
    """An output parser that returns the message unchanged."""

    def __new__(cls) -> Any:
        return RunnablePassthrough()


def test_the_model_reads_the_same_prompt_as_in_the_stuff_chain(echo: ChatKVCAG) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Use:\n\n{context}\n\nBe brief."), ("human", "{input}")])
    given = {"context": DOCUMENTS, "input": "How tall?"}
    ours = create_cag_documents_chain(echo, prompt).invoke(given)
    stuff = create_stuff_documents_chain(echo, prompt).invoke(given)
    assert ours == stuff


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("strategy", ["exact", "auto", "full"])
def test_the_model_reads_the_stuff_chains_own_tokens(family: str, strategy: Any) -> None:
    """Regression: documents were tokenised one by one, and the last one had an extra separator."""
    tokenizer = tokenizer_of(family)
    engine = HFEngine(tiny_model(vocab_size=tokenizer.vocab_size + 200, max_position_embeddings=2048), tokenizer)
    llm = ChatKVCAG(engine=engine, max_tokens=4, merge_strategy=strategy)
    cag, stuff = (
        make(llm, PROMPT, output_parser=Identity())
        for make in (create_cag_documents_chain, create_stuff_documents_chain)
    )
    for documents in (DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS):
        given = {"context": documents, "input": "How tall?"}
        ours, theirs = cag.invoke(given), stuff.invoke(given)
        assert ours.usage_metadata["input_tokens"] == theirs.usage_metadata["input_tokens"]
        if ours.response_metadata["kvcag"]["is_exact"]:
            assert ours.text == theirs.text


def test_the_report_names_tokens_that_differ(smollm_like: ChatKVCAG) -> None:
    """A document after `Context: ` begins with a space in the tokens of the joined text."""
    prompt = ChatPromptTemplate.from_messages([("system", "Context: {context}"), ("human", "{input}")])
    chain = create_cag_documents_chain(smollm_like, prompt, output_parser=Identity())
    merged = chain.invoke({"context": DOCUMENTS, "input": "How tall?"}).response_metadata["kvcag"]
    assert (
        "1 place between documents tokenised otherwise than in the joined text: begin and end each document"
        in merged["reason"]
    )
    chain = create_cag_documents_chain(smollm_like.bind(merge_strategy="exact"), prompt, output_parser=Identity())
    exact = chain.invoke({"context": DOCUMENTS, "input": "?"}).response_metadata["kvcag"]
    assert exact["reason"] == ""


@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT,
        ChatPromptTemplate.from_messages([("human", "Use:\n\n{context}\n\nQuestion: {input}")]),
        PromptTemplate.from_template("Use:\n\n{context}\n\nQuestion: {input}"),
        ChatPromptTemplate.from_messages([("human", [{"type": "text", "text": "{context}"}, "{input}"])]),
    ],
    ids=["system", "human", "string", "blocks"],
)
def test_each_document_is_found_again_wherever_the_prompt_shows_it(llm: ChatKVCAG, prompt: Any) -> None:
    chain = create_cag_documents_chain(llm, prompt, output_parser=Identity())
    chain.invoke({"context": DOCUMENTS, "input": "How tall?"})
    answer = chain.invoke({"context": DOCUMENTS[::-1], "input": "Which colour?"})
    assert answer.response_metadata["kvcag"]["encoded_tokens"] == 0
    assert answer.response_metadata["kvcag"]["mode"] == "merged"


def test_document_prompt_separator_and_variable_are_those_of_the_stuff_chain(echo: ChatKVCAG) -> None:
    settings: dict[str, Any] = {
        "document_prompt": PromptTemplate.from_template("[{source}] {page_content}"),
        "document_separator": " | ",
        "document_variable_name": "found",
    }
    prompt = ChatPromptTemplate.from_messages([("system", "{found}"), ("human", "{input}")])
    given = {"found": DOCUMENTS, "input": "?"}
    ours, stuff = (
        make(echo, prompt, **settings) for make in (create_cag_documents_chain, create_stuff_documents_chain)
    )
    assert ours.invoke(given) == stuff.invoke(given)


async def test_it_works_in_a_retrieval_chain(llm: ChatKVCAG) -> None:
    chain = create_retrieval_chain(Fixed(documents=DOCUMENTS), create_cag_documents_chain(llm, PROMPT))
    first = chain.invoke({"input": "How tall?"})
    assert first["context"] == DOCUMENTS
    assert (await chain.ainvoke({"input": "How tall?"}))["answer"] == first["answer"]
    assert "".join(part.get("answer", "") for part in chain.stream({"input": "How tall?"})) == first["answer"]


def test_it_works_behind_a_history_aware_retriever(llm: ChatKVCAG) -> None:
    rephrase = ChatPromptTemplate.from_messages([MessagesPlaceholder("chat_history"), ("human", "{input}")])
    answer = ChatPromptTemplate.from_messages(
        [("system", "Use:\n\n{context}"), MessagesPlaceholder("chat_history"), ("human", "{input}")]
    )
    retriever = create_history_aware_retriever(llm, Fixed(documents=DOCUMENTS), rephrase)
    chain = create_retrieval_chain(retriever, create_cag_documents_chain(llm, answer))
    history = [HumanMessage("How tall?"), AIMessage("Very.")]
    assert chain.invoke({"input": "And now?", "chat_history": history})["context"] == DOCUMENTS


def test_it_works_in_plain_lcel(llm: ChatKVCAG) -> None:
    retriever = Fixed(documents=DOCUMENTS)
    chain = {"context": retriever, "input": RunnablePassthrough()} | create_cag_documents_chain(llm, PROMPT)
    assert chain.batch(["How tall?", "Which colour?"]) == [chain.invoke("How tall?"), chain.invoke("Which colour?")]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_wrapped_model_finds_each_document_again(llm: ChatKVCAG, wrap: Any) -> None:
    chain = create_cag_documents_chain(wrap(llm), PROMPT, output_parser=Identity())
    chain.invoke({"context": DOCUMENTS, "input": "How tall?"})
    report = chain.invoke({"context": DOCUMENTS[::-1], "input": "How tall?"}).response_metadata["kvcag"]
    assert (report["encoded_tokens"], report["mode"]) == (0, "merged")


def test_a_foreign_model_reads_the_blocks_as_text() -> None:
    chain = create_cag_documents_chain(FakeListChatModel(responses=["fine"]), PROMPT)
    assert chain.invoke({"context": DOCUMENTS, "input": "?"}) == "fine"


def test_the_old_stuff_chain_reuses_exact_prefixes(llm: ChatKVCAG) -> None:
    chain = create_stuff_documents_chain(llm, PROMPT, output_parser=Identity())
    cold = chain.invoke({"context": DOCUMENTS, "input": "How tall?"})
    warm = chain.invoke({"context": DOCUMENTS, "input": "Which colour?"})
    shared = len("Use:\n\nThe tower is tall.\n\nIt is red.")
    assert cold.usage_metadata["input_token_details"]["cache_read"] == 0
    assert warm.usage_metadata["input_token_details"]["cache_read"] > shared


# --- refusals and warnings


def test_a_retriever_that_finds_nothing_causes_a_warning(llm: ChatKVCAG) -> None:
    chain = create_cag_documents_chain(llm, PROMPT)
    with pytest.warns(UserWarning, match="'context' is empty: the retriever found no documents"):
        chain.invoke({"context": [], "input": "How tall?"})


def test_a_prompt_without_the_variable_is_refused(llm: ChatKVCAG) -> None:
    """Regression: pydantic's error was raised instead of kvcag's."""
    with pytest.raises(
        InvalidInputError, match=r"^the prompt has no variable 'context' for the documents, only .'input'"
    ):
        create_cag_documents_chain(llm, ChatPromptTemplate.from_messages([("human", "{input}")]))
    with pytest.raises(InvalidInputError, match=r"^the prompt is a str: pass a ChatPromptTemplate"):
        create_cag_documents_chain(llm, "Use {context}")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"^the prompt has no variable 'found'"):
        llm.precompute(DOCUMENTS, PROMPT, document_variable_name="found")


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"document_separator": 7}, "document_separator: Input should be a valid string"),
        ({"document_prompt": "{page_content}"}, "document_prompt is a str: pass a PromptTemplate"),
        ({"divider": "x"}, "unknown argument divider"),
    ],
)
def test_wrong_settings_of_a_documents_prompt_are_refused_by_an_error_of_ours(
    llm: ChatKVCAG, wrong: dict[str, Any], problem: str
) -> None:
    """Regression: pydantic's error was raised, and a misspelt setting was ignored."""
    with pytest.raises(InvalidInputError, match=problem):
        llm.precompute(DOCUMENTS, PROMPT, progress=False, **wrong)


def test_documents_that_were_joined_before_are_refused(llm: ChatKVCAG) -> None:
    with pytest.raises(InvalidInputError, match=r"'context' is a str.*Pass a list of Documents"):
        create_cag_documents_chain(llm, PROMPT).invoke({"context": "one\n\ntwo", "input": "?"})


def test_a_template_that_changes_its_documents_is_refused(llm: ChatKVCAG) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "{{ context | upper }}")], template_format="jinja2")
    with pytest.raises(InvalidInputError, match=r"does not contain \{context\} unchanged"):
        create_cag_documents_chain(llm, prompt).invoke({"context": DOCUMENTS})


# --- ahead of the questions


@pytest.mark.parametrize("prompt", [PROMPT, None], ids=["with the prompt", "for any prompt"])
async def test_precomputed_documents_are_not_encoded_again(llm: ChatKVCAG, prompt: Any, capsys: Any) -> None:
    ids = llm.precompute(DOCUMENTS, prompt)
    assert "encoding: 100%" in capsys.readouterr().err
    assert await llm.aprecompute(DOCUMENTS, prompt, progress=False) == ids
    assert capsys.readouterr().err == ""
    assert len(set(ids)) == 2
    assert llm.memory().get(ids[0]).metadata["source"] == "a"
    chain = create_cag_documents_chain(llm, PROMPT, output_parser=Identity())
    report = chain.invoke({"context": DOCUMENTS, "input": "How tall?"}).response_metadata["kvcag"]
    assert report["encoded_tokens"] <= len("<|im_start|>system\nUse:\n\n")


def test_documents_that_stand_after_the_question_cannot_be_precomputed(llm: ChatKVCAG) -> None:
    prompt = ChatPromptTemplate.from_messages([("human", "{input} Use:\n\n{context}")])
    with pytest.raises(InvalidInputError, match=r"has \['input'\] before \{context\}"):
        llm.precompute(DOCUMENTS, prompt, progress=False)


async def test_documents_that_cannot_be_encoded_are_left_out_and_named(llm: ChatKVCAG, capsys: Any) -> None:
    """Regression: a document that was too long stopped the encoding of all later documents."""
    long = Document("far too long " * 300, metadata={"source": "long.md"})
    some = [DOCUMENTS[0], Document("  "), long, DOCUMENTS[1]]
    ids = llm.precompute(DOCUMENTS, progress=False)
    with pytest.warns(UserWarning, match="was left out") as caught:
        assert llm.precompute(some) == ids
    said = [str(warning.message) for warning in caught]
    assert said[0] == "document 2 was left out: it is empty."
    assert said[1] == "document 3 (long.md) was left out: it exceeds the model's context of 2,048 tokens. Split it."
    assert "2 left out" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="was left out"):
        assert await llm.aprecompute(some, progress=False) == ids
    with pytest.warns(UserWarning, match="was left out") as caught:
        assert llm.create_context(some) == llm.create_context(DOCUMENTS)
    assert re.match(
        r"document 3 \(long.md\) was left out: it has 3,902 tokens, and only [\d,]+", str(caught[1].message)
    )
    with pytest.raises(ContextLengthError), pytest.warns(UserWarning, match="was left out"):
        llm.create_context(long)


# --- a corpus by a handle


def test_contexts_with_other_instructions_are_other_contexts(llm: ChatKVCAG) -> None:
    """Regression: both contexts had the same id, since an item's key does not contain the instruction."""
    kept = [llm.create_context(DOCUMENTS, instruction=instruction) for instruction in ("Use:", "Read:", "")]
    assert len(set(kept)) == 3
    shown = [llm.memory().with_context(id, [{"role": "user", "content": "?"}])[0]["content"] for id in kept]
    assert ["".join(parts) for parts in shown] == [
        f"{before}The tower is tall.\n\nIt is red.\n\n" for before in ("Use:\n\n", "Read:\n\n", "")
    ]


async def test_a_context_is_answered_from_exactly_and_named_by_its_content(llm: ChatKVCAG) -> None:
    context = llm.create_context(DOCUMENTS, instruction="Use:")
    assert context.startswith("kv:sha256:")
    assert context == await llm.acreate_context([document.page_content for document in DOCUMENTS], instruction="Use:")
    assert context != llm.create_context(DOCUMENTS, instruction="Read:")
    answer = llm.bind(cached_content=context).invoke([("system", "Be brief."), ("human", "How tall?")])
    report = answer.response_metadata["kvcag"]
    assert (report["mode"], report["encoded_tokens"], report["recomputed_tokens"]) == ("prefix", 0, 0)
    written = [("system", "Use:\n\nThe tower is tall.\n\nIt is red.\n\nBe brief."), ("human", "How tall?")]
    fresh = ChatKVCAG(engine=HFEngine(tiny_model(), byte_tokenizer()), max_tokens=8)
    assert answer.text == fresh.invoke(written).text


@pytest.mark.parametrize("source", ["It is red.", "b"])
def test_a_context_is_purged_with_any_of_its_documents(llm: ChatKVCAG, source: str) -> None:
    """Regression: a context was found only by its whole text."""
    context, other = llm.create_context(DOCUMENTS), llm.create_context(["something else"])
    assert llm.memory().purge("no such source").ids == []
    assert llm.memory().purge(source).ids == [context]
    assert list(llm.memory().store.keys()) == [other]


def test_a_context_outlives_the_process(tmp_path: Path) -> None:
    first, second = (
        ChatKVCAG(engine=HFEngine(tiny_model(), byte_tokenizer()), max_tokens=8, store=tmp_path) for _ in range(2)
    )
    context = first.create_context(DOCUMENTS)
    answers = [llm.invoke("How tall?", cached_content=context) for llm in (first, second)]
    assert answers[0].text == answers[1].text
    assert answers[1].response_metadata["kvcag"]["encoded_tokens"] <= len("<|im_start|>system\n")


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("strategy", ["auto", "exact"])
def test_a_context_is_found_in_the_store_whatever_the_tokenizer_makes_of_its_end(
    tmp_path: Path, family: str, strategy: Any
) -> None:
    for expected in (False, True):
        tokenizer = tokenizer_of(family)
        engine = HFEngine(tiny_model(vocab_size=tokenizer.vocab_size + 8), tokenizer)
        llm = ChatKVCAG(engine=engine, max_tokens=2, store=tmp_path, merge_strategy=strategy)
        if not expected:
            context = llm.create_context(DOCUMENTS, "Use:")
            engine.prefixes.clear()
        report = llm.invoke("How tall?", cached_content=context).response_metadata["kvcag"]
        assert report["encoded_tokens"] <= len(tokenizer("<|im_start|>system\n")["input_ids"])


def test_a_context_of_another_model_is_encoded_again_with_one_warning(tmp_path: Path) -> None:
    mine = ChatKVCAG(engine=HFEngine(tiny_model(), byte_tokenizer()), max_tokens=8, store=tmp_path)
    mine.invoke([HumanMessage(["a document of my own. ", "?"])])
    other = ChatKVCAG(engine=HFEngine(tiny_model(seed=4), byte_tokenizer()), max_tokens=8, store=tmp_path)
    context = mine.create_context(DOCUMENTS)
    with pytest.warns(CacheWarning, match="made by another model") as caught:
        answer = other.invoke("How tall?", cached_content=context)
    assert len([w for w in caught if context in str(w.message)]) == 1
    assert answer.response_metadata["kvcag"]["encoded_tokens"] > len("It is red.")


def test_an_unknown_context_is_refused(llm: ChatKVCAG) -> None:
    with pytest.raises(InvalidInputError, match=r"there is no context 'kv:sha256:00'.*create_context"):
        llm.invoke("How tall?", cached_content="kv:sha256:00")


def test_an_empty_corpus_is_refused(llm: ChatKVCAG) -> None:
    with pytest.raises(EmptyPromptError, match="the corpus is empty"):
        llm.create_context([])


def test_precompute_leaves_an_empty_document_out(llm: ChatKVCAG) -> None:
    for prompt in (None, PROMPT):
        with pytest.warns(UserWarning, match="document 1 was left out: it is empty"):
            assert len(llm.precompute(["", "It is red."], prompt, progress=False)) == 1


def test_precompute_tells_a_document_from_a_marked_block_before_it(llm: ChatKVCAG) -> None:
    rules = {"type": "text", "text": "Rules are rules.\n\n", "cache_control": {"type": "ephemeral"}}
    prompt = ChatPromptTemplate.from_messages([SystemMessage([rules]), ("human", "{context}\n\n{input}")])
    ids = llm.precompute(DOCUMENTS, prompt, progress=False)
    kept = [llm.memory().get(id) for id in ids]
    assert [item.records.composed_text_memory.strip() for item in kept] == [each.page_content for each in DOCUMENTS]
    assert [item.metadata["source"] for item in kept] == ["a", "b"]
    assert len(llm.memory()) == 3
