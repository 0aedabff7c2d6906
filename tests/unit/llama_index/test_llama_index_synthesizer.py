"""CAGSynthesizer and CAGQueryEngine: prompts, caches and responses."""

import re
import warnings
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any

import llama_index.core
import pytest
from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import MetadataReplacementPostProcessor, SimilarityPostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine
from llama_index.core.query_engine.citation_query_engine import CITATION_QA_TEMPLATE
from llama_index.core.response_synthesizers import CompactAndRefine, Refine, TreeSummarize
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.retrievers.bm25 import BM25Retriever
from pydantic import BaseModel

from kvcag import HFEngine
from kvcag.errors import ConstraintBudgetError, ContextLengthError, InvalidInputError
from kvcag.llama_index import CAGQueryEngine, CAGSynthesizer, KVCacheLLM, RoundsWarning
from kvcag.llama_index.messages import to_messages
from kvcag.testing import EchoEngine, byte_tokenizer, tiny_model, whole_prompt
from tests.stored import documents_in

TEXTS = ["The tower is 330 metres tall.", "It was built in 1889 {by} Eiffel.", "It stands in Paris."]


class Tall(BaseModel):
    metres: int


def nodes(texts: list[str] = TEXTS) -> list[TextNode]:
    return [TextNode(text=text, id_=f"node-{index}") for index, text in enumerate(texts)]


def scored(texts: list[str] = TEXTS) -> list[NodeWithScore]:
    return [NodeWithScore(node=node, score=1.0) for node in nodes(texts)]


@pytest.fixture
def tiny_llm(tiny_engine: HFEngine) -> KVCacheLLM:
    return KVCacheLLM(engine=tiny_engine, max_new_tokens=6)


# --- what is asked -------------------------------------------------------------------------------------------------


def test_the_model_reads_what_rag_would_have_it_read(llm: KVCacheLLM) -> None:
    rag = str(CompactAndRefine(llm).synthesize("How tall?", scored()))
    cag = str(CAGSynthesizer(llm).synthesize("How tall?", scored()))
    assert cag == rag


def test_every_text_is_a_document_of_its_own(llm: KVCacheLLM) -> None:
    messages = CAGSynthesizer(llm).messages("How tall?", TEXTS)
    prompt = llm.engine.template.prompt(to_messages(messages))
    assert [document.strip() for document in prompt.documents] == TEXTS


def test_a_template_that_shows_its_context_twice_or_never_is_asked_as_it_is(llm: KVCacheLLM) -> None:
    twice = CAGSynthesizer(llm, text_qa_template=PromptTemplate("{context_str}|{query_str}|{context_str}"))
    assert str(twice.synthesize("Q", scored(["a", "b"]))) == "user: a\n\nb|Q|a\n\nb"
    never = CAGSynthesizer(llm, text_qa_template=PromptTemplate("Just {query_str}"))
    assert str(never.synthesize("Q", scored())) == "user: Just Q"


def test_system_prompt_and_the_templates_own_are_one(llm: KVCacheLLM) -> None:
    prompted = KVCacheLLM(engine=EchoEngine(whole_prompt), system_prompt="Be kind.")
    said = str(CAGSynthesizer(prompted).synthesize("Q", scored()))
    assert said.startswith("system: Be kind.\n\nYou are an expert Q&A system")
    assert said.count("system: ") == 1


def test_canonical_order_is_the_same_for_every_order_of_retrieval(llm: KVCacheLLM) -> None:
    one, other = (
        str(CAGSynthesizer(llm, order="canonical").synthesize("Q", found)) for found in (scored(), scored()[::-1])
    )
    assert one == other
    retrieval = CAGSynthesizer(llm)
    assert str(retrieval.synthesize("Q", scored())) != str(retrieval.synthesize("Q", scored()[::-1]))


def test_an_unknown_order_is_refused(llm: KVCacheLLM) -> None:
    """Regression: an unknown order was treated as `retrieval`."""
    wrong: Any = "canonic"
    with pytest.raises(InvalidInputError, match="order 'canonic': use one of retrieval, canonical"):
        CAGSynthesizer(llm, order=wrong)


def test_prompts_can_be_updated_from_the_query_engine(llm: KVCacheLLM) -> None:
    engine = CAGQueryEngine.from_documents(nodes(), llm)
    before = str(engine.query("Q"))
    assert set(engine.get_prompts()) == {
        "response_synthesizer:text_qa_template",
        "response_synthesizer:refine_template",
    }
    engine.update_prompts({"response_synthesizer:text_qa_template": PromptTemplate("Shout! {context_str} {query_str}")})
    assert str(engine.query("Q")).startswith("user: Shout!")
    assert not before.startswith("user: Shout!")


# --- what comes back -----------------------------------------------------------------------------------------------


async def test_synchronous_asynchronous_and_streamed_answers_are_the_same(tiny_llm: KVCacheLLM) -> None:
    plain, streaming = CAGSynthesizer(tiny_llm), CAGSynthesizer(tiny_llm, streaming=True)
    answer = plain.synthesize("How tall?", scored())
    stream = streaming.synthesize("How tall?", scored())
    astream = await streaming.asynthesize("How tall?", scored())
    assert type(answer) is Response
    assert isinstance(stream, StreamingResponse)
    assert isinstance(stream.response_gen, Generator)
    assert isinstance(astream, AsyncStreamingResponse)
    assert isinstance(astream.response_gen, AsyncGenerator)
    answers = {
        str(answer),
        str(await plain.asynthesize("How tall?", scored())),
        "".join(stream.response_gen),
        "".join([piece async for piece in astream.async_response_gen()]),
    }
    assert len(answers) == 1
    assert [node.node_id for node in stream.source_nodes] == [node.node_id for node in answer.source_nodes]


@pytest.mark.parametrize("found", [[], scored(["", "  \n"])])
@pytest.mark.parametrize("streaming", [True, False])
async def test_without_anything_to_read_the_response_is_empty(
    llm: KVCacheLLM, found: list[NodeWithScore], streaming: bool
) -> None:
    synthesizer = CAGSynthesizer(llm, streaming=streaming)
    assert str(synthesizer.synthesize("Q", found)) == "Empty Response"
    answer = await synthesizer.asynthesize("Q", found)
    text = "".join([piece async for piece in answer.async_response_gen()]) if streaming else str(answer)
    assert text == "Empty Response"


def test_an_llm_that_keeps_no_caches_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="llm is a MockLLM"):
        CAGSynthesizer(MockLLM())


def test_the_llm_may_come_from_settings(llm: KVCacheLLM) -> None:
    before = Settings._llm
    Settings.llm = llm
    try:
        assert "330" in str(CAGSynthesizer().synthesize("Q", scored()))
    finally:
        Settings._llm = before


# --- what is cached ------------------------------------------------------------------------------------------------


def test_a_second_question_encodes_no_document_again(tiny_engine: HFEngine) -> None:
    tiny_llm = KVCacheLLM(engine=tiny_engine, merge_strategy="query", max_new_tokens=6)
    synthesizer = CAGSynthesizer(tiny_llm)

    def ask(question: str, found: list[str]) -> dict[str, int]:
        return tiny_llm.chat(synthesizer.messages(question, found)).raw["usage"]["context"]

    cold, warm, turned = ask("How tall?", TEXTS), ask("When?", TEXTS), ask("When?", TEXTS[::-1])
    assert cold["encoded_tokens"] > warm["encoded_tokens"] == turned["encoded_tokens"] == 0
    assert warm["mode"] == turned["mode"] == "merged"
    assert 0 < warm["recomputed_tokens"] <= 0.2 * warm["context_tokens"]


def test_the_exact_strategy_is_a_full_prefill_and_encodes_only_the_tail_again(tiny_engine: HFEngine) -> None:
    llm = KVCacheLLM(engine=tiny_engine, merge_strategy="exact", max_new_tokens=12)
    synthesizer = CAGSynthesizer(llm)
    fresh = KVCacheLLM(engine=HFEngine(tiny_model(), byte_tokenizer(), prefix_cache_bytes=0), merge_strategy="exact")
    for question in ("How tall?", "When?"):
        messages = synthesizer.messages(question, TEXTS)
        answer = llm.chat(messages)
        assert answer.message.content == fresh.chat(messages, max_new_tokens=12).message.content
    usage = answer.raw["usage"]
    tail = usage["prompt_tokens"] - usage["context"]["context_tokens"]
    assert usage["created_tokens"] <= tail
    assert usage["prompt_tokens"] - usage["cached_tokens"] <= tail


def test_a_whole_corpus_is_one_exact_prefix_that_outlives_the_engine(tmp_path) -> None:
    def ask(question: str, store: object, **settings: object) -> tuple[str, dict]:
        engine = HFEngine(tiny_model(), byte_tokenizer(), prefix_cache_bytes=0)
        llm = KVCacheLLM(engine=engine, store=store, max_new_tokens=12)
        synthesizer = CAGQueryEngine.from_documents(nodes(), llm, **settings)._response_synthesizer
        answer = llm.chat(synthesizer.messages(question, TEXTS))
        return answer.message.content, answer.raw["usage"]["context"]

    ask("When?", tmp_path)
    answer, context = ask("How tall?", tmp_path)
    assert (context["mode"], context["is_exact"], context["recomputed_tokens"]) == ("prefix", True, 0)
    assert context["reused_tokens"] >= sum(map(len, TEXTS))
    assert answer == ask("How tall?", None)[0]
    assert ask("How tall?", None, exact=False)[1]["mode"] == "merged"


def test_text_that_changed_under_the_same_id_is_never_answered_from_a_stale_cache(tiny_llm: KVCacheLLM) -> None:
    """The text differs by its window of sentences or its metadata; the node id and the hash stay the same."""
    windowed = nodes()
    for node in windowed:
        node.metadata = {"window": f"{node.text} And more."}
        node.excluded_llm_metadata_keys = ["window"]
    retriever = CAGQueryEngine.from_documents(windowed, tiny_llm).retriever
    swap = MetadataReplacementPostProcessor(target_metadata_key="window")
    plain = CAGQueryEngine.from_retriever(retriever, tiny_llm)
    swapped = CAGQueryEngine.from_retriever(retriever, tiny_llm, node_postprocessors=[swap])
    store = tiny_llm.memory.store

    def texts() -> set[str]:
        return {store.manifest(key).records.composed_text_memory.strip() for key in documents_in(store)}

    plain.query("How tall?")
    assert texts() == set(TEXTS)
    swapped.query("How tall?")
    assert texts() == {*TEXTS, *(f"{text} And more." for text in TEXTS)}
    shown = [TextNode(text=text, id_=str(i), metadata={"year": 1889}) for i, text in enumerate(TEXTS)]
    CAGQueryEngine.from_documents(shown, tiny_llm, exact=False).query("How tall?")
    assert {f"year: 1889\n\n{text}" for text in TEXTS} < texts()


def test_a_cited_passage_is_the_same_document_at_every_rank(tiny_engine: HFEngine) -> None:
    llm = KVCacheLLM(engine=tiny_engine, max_new_tokens=4)
    CAGQueryEngine.from_documents(nodes(), llm, exact=False).query("How tall?")
    kept = set(documents_in(llm.memory.store))
    for ordered in (nodes(), nodes()[::-1]):
        retriever = CAGQueryEngine.from_documents(ordered, llm).retriever
        ours = CAGSynthesizer(llm, text_qa_template=CITATION_QA_TEMPLATE)
        engine = CitationQueryEngine(retriever, llm=llm, response_synthesizer=ours)
        cited = engine.query("How tall?").source_nodes
        assert [source.node.text for source in cited] == [
            f"Source {at}:\n{node.text}\n" for at, node in enumerate(ordered, start=1)
        ]
        assert set(documents_in(llm.memory.store)) == kept


def test_a_cited_prompt_is_cores(llm: KVCacheLLM) -> None:
    retriever = CAGQueryEngine.from_documents(nodes(), llm).retriever
    ours = CAGSynthesizer(llm, text_qa_template=CITATION_QA_TEMPLATE)
    plain = CompactAndRefine(llm, text_qa_template=CITATION_QA_TEMPLATE)
    answers = [
        str(CitationQueryEngine(retriever, llm=llm, response_synthesizer=synthesizer).query("How tall?"))
        for synthesizer in (ours, plain)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "made", ["Sub question: How tall?\nResponse: 330 metres.", "\nQuestion: How tall?\nAnswer: 330."]
)
def test_answers_that_core_joins_are_read_and_not_kept(tiny_engine: HFEngine, made: str, exact: bool) -> None:
    llm = KVCacheLLM(engine=tiny_engine, max_new_tokens=4)
    synthesizer = CAGSynthesizer(llm, exact=exact)
    for texts in ([made], [made, made]):
        [content] = [message["content"] for message in to_messages(synthesizer.messages("Q", texts))[1:]]
        shown = content if isinstance(content, str) else "".join(content)
        assert "\n\n".join(text.strip() for text in texts) in shown
        synthesizer.synthesize("Q", scored(texts))
    assert documents_in(llm.memory.store) == []


def test_a_text_that_an_index_deleted_can_be_purged(tiny_engine: HFEngine) -> None:
    """Follows the guide."""
    llm = KVCacheLLM(engine=tiny_engine, max_new_tokens=4)
    documents = [Document(text=text, doc_id=str(at)) for at, text in enumerate(TEXTS)]
    index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=4))
    index.as_query_engine(llm=llm, response_synthesizer=CAGSynthesizer(llm), similarity_top_k=3).query("How tall?")
    assert len(documents_in(llm.memory.store)) == 3
    for id in index.docstore.get_ref_doc_info("0").node_ids:
        llm.memory.purge(index.docstore.get_node(id).get_content(MetadataMode.LLM))
    index.delete_ref_doc("0", delete_from_docstore=True)
    kept = [item.records.composed_text_memory.strip() for item in llm.memory.get_all()]
    assert sorted(kept) == sorted(TEXTS[1:])


# --- rounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
async def test_documents_that_do_not_fit_together_are_read_in_rounds_with_a_warning(streaming: bool) -> None:
    engine = EchoEngine(lambda prompt: "so far", context_length=2600)
    synthesizer = CAGSynthesizer(KVCacheLLM(engine=engine, max_new_tokens=100), streaming=streaming)
    found = scored([f"Document {i}. " + "word " * 60 for i in range(12)])
    with pytest.warns(RoundsWarning, match=r"12 documents .* 2600 tokens .* in \d rounds"):
        assert str(synthesizer.synthesize("How tall?", found)) == "so far"
    asked = [str(engine.tokenizer.decode(list(token_ids))) for _, token_ids in engine.prompts]
    assert len(asked) > 1
    assert all("How tall?" in prompt for prompt in asked)
    assert ["so far" in prompt for prompt in asked] == [False] + [True] * (len(asked) - 1)
    read = [int(number) for prompt in asked for number in re.findall(r"Document (\d+)\.", prompt)]
    assert read == list(range(12))
    with pytest.warns(RoundsWarning):
        await synthesizer.asynthesize("How tall?", found)


def test_a_document_longer_than_the_context_is_cut_and_read_whole() -> None:
    engine = EchoEngine(lambda prompt: "so far", context_length=2000)
    synthesizer = CAGSynthesizer(KVCacheLLM(engine=engine, max_new_tokens=100))
    words = [f"w{i}" for i in range(900)]
    with pytest.warns(RoundsWarning):
        synthesizer.synthesize("How tall?", scored([" ".join(words)]))
    asked = " ".join(str(engine.tokenizer.decode(list(token_ids))) for _, token_ids in engine.prompts)
    assert re.findall(r"\bw\d+\b", asked) == words


def test_documents_that_fit_are_read_at_once_without_a_warning(llm: KVCacheLLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CAGSynthesizer(llm).synthesize("How tall?", scored())
    assert len(llm.engine.prompts) == 1


# --- over retrievers -----------------------------------------------------------------------------------------------


def test_sources_are_those_of_rag_after_postprocessors(llm: KVCacheLLM) -> None:
    retriever = BM25Retriever.from_defaults(nodes=nodes(), similarity_top_k=3)
    keep = [SimilarityPostprocessor(similarity_cutoff=0.1)]
    rag = RetrieverQueryEngine.from_args(retriever, llm=llm, node_postprocessors=keep)
    cag = RetrieverQueryEngine(retriever, CAGSynthesizer(llm), node_postprocessors=keep)
    ours = CAGQueryEngine.from_retriever(retriever, llm, node_postprocessors=keep)
    question = "How tall is the tower?"
    expected = rag.query(question).source_nodes
    assert 0 < len(expected) < 3
    assert cag.query(question).source_nodes == ours.query(question).source_nodes == expected


async def test_an_index_needs_one_more_argument(llm: KVCacheLLM) -> None:
    index = VectorStoreIndex(nodes(), embed_model=MockEmbedding(embed_dim=4))
    engine = index.as_query_engine(llm=llm, response_synthesizer=CAGSynthesizer(llm), similarity_top_k=2)
    answer = engine.query("How tall?")
    retrieved = index.as_retriever(similarity_top_k=2).retrieve("How tall?")
    assert [node.node_id for node in answer.source_nodes] == [node.node_id for node in retrieved]
    assert all(node.text in str(answer) for node in answer.source_nodes)
    assert str(await engine.aquery("How tall?")) == str(answer)


def test_a_whole_corpus_is_answered_from_without_an_index(llm: KVCacheLLM) -> None:
    documents = [Document(text=text, metadata={"title": f"T{i}"}) for i, text in enumerate(TEXTS)]
    answer = CAGQueryEngine.from_documents(documents, llm).query("How tall?")
    assert [source.node for source in answer.source_nodes] == documents
    assert all(document.get_content(MetadataMode.LLM) in str(answer) for document in documents)
    with pytest.raises(InvalidInputError, match="at least one"):
        CAGQueryEngine.from_documents([], llm)


# --- errors reach the caller, also through core's synthesizers, which swallow every ValueError ----------------------

TABLE = "\n".join(f"| {i} | {i * 7919 % 1000}.{i} | {i:x} |" for i in range(120))
"""Far more bytes than a tiktoken count thinks."""


@pytest.fixture
def _tokenizer_as_it_was() -> Iterator[None]:
    before = llama_index.core.global_tokenizer
    yield
    llama_index.core.global_tokenizer = before


def shorter(**settings: Any) -> KVCacheLLM:
    return KVCacheLLM(engine=EchoEngine(lambda prompt: "so far", context_length=2600), max_new_tokens=100, **settings)


async def test_a_prompt_that_is_too_long_is_never_an_empty_response() -> None:
    refused = r"context of 2600\..* Settings.tokenizer = llm.engine"
    for synthesizer in (CompactAndRefine(shorter()), Refine(shorter()), TreeSummarize(shorter())):
        with pytest.raises(ContextLengthError, match=refused):
            synthesizer.synthesize("How many?", scored([TABLE]))
        with pytest.raises(ContextLengthError, match=refused):
            await synthesizer.asynthesize("How many?", scored([TABLE]))


@pytest.mark.usefixtures("_tokenizer_as_it_was")
def test_cores_synthesizers_read_in_rounds_once_they_count_with_the_models_tokenizer() -> None:
    llm = shorter()
    Settings.tokenizer = llm.engine.template.encode
    assert str(CompactAndRefine(llm).synthesize("How many?", scored([TABLE]))) == "so far"
    assert len(llm.engine.prompts) > 1
    with pytest.raises(ContextLengthError, match=r"lower max_new_tokens\.$"):
        llm.complete("x" * 3000)


def test_an_answer_that_does_not_fit_its_schema_is_never_an_empty_response() -> None:
    pytest.importorskip("llguidance")
    synthesizer = CompactAndRefine(KVCacheLLM(engine=EchoEngine(), max_new_tokens=3), output_cls=Tall)
    with pytest.raises(ConstraintBudgetError, match="max_new_tokens is 3"):
        synthesizer.synthesize("How tall?", scored())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"max_new_tokens": 0},
        {"top_p": 2},
        {"stop": [""]},
        {"recompute_ratio": 7},
        {"max_kl": "much"},
        {"merge_strategy": "none"},
    ],
)
def test_settings_are_checked_by_the_constructor_and_when_they_are_set(wrong: dict[str, Any], llm: KVCacheLLM) -> None:
    """Regression: the constructor raised pydantic's error instead of kvcag's."""
    [(name, value)] = wrong.items()
    before = getattr(llm, name)
    with pytest.raises(InvalidInputError, match=name):
        KVCacheLLM("never/loaded", **wrong)
    with pytest.raises(InvalidInputError, match=name):
        setattr(llm, name, value)
    assert getattr(llm, name) == before
