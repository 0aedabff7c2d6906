from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import torch
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import ConfigurableField
from pydantic import ValidationError

from kvcag import CacheWarning, HFEngine
from kvcag.chat_template import Prompt
from kvcag.errors import (
    ChatTemplateError,
    ContextLengthError,
    FingerprintMismatchError,
    InvalidInputError,
    KVCAGError,
    UnsupportedContentError,
    UnsupportedModelError,
)
from kvcag.langchain import ChatKVCAG
from kvcag.stores.disk import DiskStore
from kvcag.stores.memory import MemoryStore
from kvcag.testing import EchoEngine, byte_tokenizer, tiny_model


def with_docs(*documents: str, question: str = "why?") -> list[BaseMessage]:
    return [SystemMessage([*documents, "Answer."]), HumanMessage(question)]


def read(message: AIMessage) -> int:
    return message.usage_metadata["input_token_details"]["cache_read"]


def essence(message: AIMessage) -> tuple[Any, ...]:
    """The parts of an answer that every way of calling must share. Times and cache counts may differ."""
    usage = {name: message.usage_metadata[name] for name in ("input_tokens", "output_tokens", "total_tokens")}
    return message.text, usage, message.response_metadata["finish_reason"], message.response_metadata["model_name"]


def whole(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    first, *rest = chunks
    return first.__add__(rest)  # type: ignore[arg-type]


# --- construction ---------------------------------------------------------------------------------------------------


def test_making_one_loads_nothing_and_needs_no_network() -> None:
    llm = ChatKVCAG(
        model="nobody/has-such-a-model",
        temperature=0.1,
        max_tokens=5,
        timeout=3,
        stop=["x"],
        max_retries=2,
        api_key="k",
    )
    assert llm._identifying_params["model"] == "nobody/has-such-a-model"
    assert not llm._lazy_memory().loaded


def test_one_without_a_model_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"there is no model\. Pass model="):
        ChatKVCAG()


def test_a_misspelt_setting_is_refused(tiny_engine: HFEngine) -> None:
    with pytest.raises(ValidationError, match="temprature"):
        ChatKVCAG(engine=tiny_engine, temprature=1)


def test_another_models_engine_is_refused(tiny_engine: HFEngine) -> None:
    with pytest.raises(ValidationError, match="Pass one of them"):
        ChatKVCAG(engine=tiny_engine, model="other/model")


def test_weights_that_are_not_the_expected_ones_are_refused(tiny_engine: HFEngine) -> None:
    llm = ChatKVCAG(engine=tiny_engine, fingerprint="0" * 64)
    with pytest.raises(FingerprintMismatchError, match="was made by another model"):
        llm.invoke("hello")


def test_a_model_is_loaded_once_for_all_who_ask_for_it(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    one, two = (ChatKVCAG(model=tmp_path, max_tokens=length, device="cpu", dtype=torch.float32) for length in (3, 5))
    assert one.get_num_tokens("four") == 4
    assert not one._lazy_memory().loaded
    one.invoke("hello")
    assert one.memory().engine is two.memory().engine
    assert two.profile["max_input_tokens"] == 2048


def test_a_call_can_name_another_model(tiny_engine: HFEngine, tmp_path: Path) -> None:
    tiny_model(seed=7).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    llm = ChatKVCAG(engine=tiny_engine, max_tokens=8, device="cpu")
    own, other = llm.invoke("hello"), llm.invoke("hello", model=str(tmp_path))
    assert other.response_metadata["model_name"] == str(tmp_path)
    assert own.text != other.text


# --- the same answer however it is asked ------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["hello", with_docs("one. ", "two. ")], ids=["plain", "documents"])
async def test_all_ways_to_call_give_the_same_answer(llm: ChatKVCAG, asked: Any) -> None:
    first = llm.invoke(asked)
    ways = [
        whole(list(llm.stream(asked))),
        await llm.ainvoke(asked),
        whole([chunk async for chunk in llm.astream(asked)]),
        *llm.batch([asked, asked]),
        *await llm.abatch([asked]),
        llm.invoke(asked, stream=True),
        ChatKVCAG(engine=llm.engine, max_tokens=8, disable_streaming=True).invoke(asked),
    ]
    assert [essence(way) for way in ways] == [essence(first)] * len(ways)


def test_streaming_may_be_switched_on_for_invoke_and_off_for_stream(tiny_engine: HFEngine) -> None:
    pieces = {switch: ChatKVCAG(engine=tiny_engine, max_tokens=8, streaming=switch) for switch in (True, False)}
    assert len(list(pieces[True].stream("hello"))) > 2
    assert len(list(pieces[False].stream("hello"))) == 1


def test_one_chunk_carries_usage_and_model_and_it_is_the_last(llm: ChatKVCAG) -> None:
    chunks = list(llm.stream("hello"))
    assert [bool(chunk.usage_metadata) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [bool(chunk.response_metadata.get("model_name")) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].chunk_position == "last"


def test_a_last_message_of_the_model_is_continued(llm: ChatKVCAG) -> None:
    """Regression: the message was ended, and the model began a new answer."""
    said = llm.invoke("hello").text
    asked: list[BaseMessage] = [HumanMessage("hello"), AIMessage("abc")]
    echo = ChatKVCAG(engine=EchoEngine(lambda prompt: prompt[-13:]), max_tokens=99)
    assert echo.invoke(asked).text == "assistant\nabc"
    assert llm.get_num_tokens_from_messages(asked) == llm.invoke(asked).usage_metadata["input_tokens"]
    assert said.isascii() is False or llm.invoke([HumanMessage("hello"), AIMessage(said[:3])]).text == said[3:]
    with_tool = ChatKVCAG(engine=EchoEngine(lambda prompt: prompt[-13:]), max_tokens=99).bind_tools([], stop=["zz"])
    assert with_tool.invoke(asked).text == "assistant\nabc"
    structured = llm.with_structured_output({"title": "A", "type": "object", "properties": {}})
    assert structured.invoke(asked, max_tokens=40) == {}


def test_the_answer_is_the_engines_own(llm: ChatKVCAG, tiny_engine: HFEngine) -> None:
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    expected = HFEngine(tiny_model(), byte_tokenizer(), prefix_cache_bytes=0).generate(asked, max_new_tokens=8)
    assert llm.invoke([("system", "be brief"), ("human", "hello")]).text == expected


def test_batches_equal_single_calls_and_encode_their_documents_once(tiny_engine: HFEngine) -> None:
    questions = [with_docs("one. ", "two. ", question=question) for question in ("a?", "b?", "c?", "d?")]
    settings = {"engine": tiny_engine, "max_tokens": 8, "merge_strategy": "query"}
    alone = [ChatKVCAG(**settings, store=MemoryStore()).invoke(q) for q in questions]
    tiny_engine.prefixes.clear()
    batch = ChatKVCAG(**settings, store=MemoryStore()).batch(questions)
    assert [answer.text for answer in batch] == [answer.text for answer in alone]
    encoded = [answer.response_metadata["kvcag"]["encoded_tokens"] for answer in batch]
    assert sum(count >= len("one. two. ") for count in encoded) == 1  # the others encode the instruction at most


def test_a_batch_encodes_a_beginning_that_its_prompts_share_once(llm: ChatKVCAG) -> None:
    shared = SystemMessage("a long instruction " * 10)
    answers = llm.batch([[shared, HumanMessage(question)] for question in ("a?", "b?", "c?", "d?")])
    created = [answer.usage_metadata["input_token_details"]["cache_creation"] for answer in answers]
    assert sum(count > len(shared.text) for count in created) == 1


# --- reuse ------------------------------------------------------------------------------------------------------------


def test_the_second_call_reads_from_the_cache_and_counts_the_same_input(llm: ChatKVCAG) -> None:
    cold, warm = llm.invoke(with_docs("one. ", "two. ")), llm.invoke(with_docs("one. ", "two. "))
    assert read(cold) < read(warm)
    assert cold.usage_metadata["input_tokens"] == warm.usage_metadata["input_tokens"]
    for answer in (cold, warm):
        assert sum(answer.usage_metadata["input_token_details"].values()) <= answer.usage_metadata["input_tokens"]


@pytest.mark.parametrize("strategy", ["auto", "query", "rotate", "full", "exact"])
def test_usage_and_reports_add_up_whatever_was_cached(tiny_engine: HFEngine, strategy: Any) -> None:
    llm = ChatKVCAG(engine=tiny_engine, max_tokens=2, merge_strategy=strategy, store=MemoryStore())
    documents = [f"document {number} says {'xyz' * number}. " for number in range(4)]
    for order in ((0, 1), (1, 0, 2), (2, 1), (1, 0, 2), (3, 2, 1, 0)):
        asked = with_docs(*(documents[number] for number in order))
        for _ in range(2):
            answer = llm.invoke(asked)
            total, details = answer.usage_metadata["input_tokens"], answer.usage_metadata["input_token_details"]
            report = answer.response_metadata["kvcag"]
            assert 0 <= details["cache_read"] <= details["cache_read"] + details["cache_creation"] <= total
            parts = [report[f"{name}_tokens"] for name in ("reused", "recomputed", "encoded")]
            assert sum(parts) == report["context_tokens"]
            asked = [*asked, answer, HumanMessage("and?")]


def test_every_report_counts_encoded_tokens(llm: ChatKVCAG) -> None:
    """Regression: without documents, the report had no counts."""
    cold, warm = llm.invoke("hello there"), llm.invoke("hello there")
    for answer in (cold, warm):
        report, total = answer.response_metadata["kvcag"], answer.usage_metadata["input_tokens"]
        assert report["reused_tokens"] + report["encoded_tokens"] == total
    assert warm.response_metadata["kvcag"]["encoded_tokens"] == 1


HALF = "caf\ud83d"


def called(argument: str, result: str) -> list[BaseMessage]:
    """A question, a call of a tool and its result."""
    call = {"name": "f", "args": {"a": argument}, "id": "1"}
    return [HumanMessage("?"), AIMessage("", tool_calls=[call]), ToolMessage(result, tool_call_id="1")]


@pytest.mark.parametrize(
    "asked",
    [
        HALF,
        with_docs("doc \ud83d", "b"),
        [HumanMessage("?"), AIMessage(HALF)],
        called(HALF, "1"),
        called("x", HALF),
    ],
    ids=["question", "document", "answer", "call", "result"],
)
def test_half_of_a_surrogate_pair_is_refused(llm: ChatKVCAG, asked: Any) -> None:
    with pytest.raises(InvalidInputError, match="half of a surrogate pair"):
        llm.invoke(asked)


def test_half_of_a_surrogate_pair_in_a_setting_is_refused(llm: ChatKVCAG) -> None:
    tool = {"name": "f", "description": HALF, "parameters": {"type": "object", "properties": {}}}
    for ask in (
        lambda: llm.invoke("?", stop=[HALF]),
        lambda: llm.create_context(["a"], HALF),
        lambda: llm.precompute([HALF], progress=False),
        lambda: llm.bind_tools([{"type": "function", "function": tool}]).invoke("?"),
        lambda: llm.get_num_tokens(HALF),
    ):
        with pytest.raises(InvalidInputError, match="half of a surrogate pair"):
            ask()
    with pytest.raises(KVCAGError, match="cannot be used"):
        llm.with_structured_output({"title": "A", "type": "object", "properties": {"a": {"enum": [HALF]}}}).invoke("?")


def test_documents_in_another_order_are_found_and_reported_as_merged(llm: ChatKVCAG) -> None:
    llm.invoke(with_docs("first document. ", "second document. "))
    again = llm.invoke(with_docs("second document. ", "first document. "))
    report = again.response_metadata["kvcag"]
    assert (report["mode"], report["encoded_tokens"]) == ("merged", 0)
    assert read(again) > 0


def test_each_turn_of_a_chat_reuses_the_last(llm: ChatKVCAG) -> None:
    history: list[BaseMessage] = [HumanMessage("hello")]
    for _ in range(3):
        answer = llm.invoke(history)
        known = answer.usage_metadata["input_tokens"]
        history += [answer, HumanMessage("and then?")]
        # An answer is random bytes here, and may read back as other tokens: the prompt before it is what must hit.
        assert read(llm.invoke(history)) >= known


@pytest.mark.parametrize("strategy", ["exact", "full"])
def test_the_merge_strategy_of_a_call_is_taken(llm: ChatKVCAG, strategy: str) -> None:
    answer = llm.invoke(with_docs("one. ", "two. "), merge_strategy=strategy)
    assert answer.response_metadata["kvcag"]["strategy"] == strategy


def test_a_damaged_cache_is_encoded_again_with_one_warning(tiny_engine: HFEngine, tmp_path: Path) -> None:
    ask = with_docs("a document that is kept. ", "another. ")
    clean = ChatKVCAG(engine=tiny_engine, max_tokens=8, store=tmp_path).invoke(ask)
    file = max(tmp_path.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    tiny_engine.prefixes.clear()
    with pytest.warns(CacheWarning, match="damaged") as caught:
        again = ChatKVCAG(engine=tiny_engine, max_tokens=8, store=tmp_path).invoke(ask)
    assert len(caught) == 1
    assert again.text == clean.text


def test_a_store_of_another_model_is_not_used_and_said_so(tiny_engine: HFEngine, tmp_path: Path) -> None:
    other = HFEngine(tiny_model(seed=5), byte_tokenizer())
    ChatKVCAG(engine=other, max_tokens=8, store=tmp_path).invoke(with_docs("one. ", "two. "))
    with pytest.warns(CacheWarning, match="made by another model.*Give each model a store of its own") as caught:
        answer = ChatKVCAG(engine=tiny_engine, max_tokens=8, store=tmp_path).invoke(with_docs("one. ", "two. "))
    assert len(caught) == 1
    assert answer.text == ChatKVCAG(engine=tiny_engine, max_tokens=8).invoke(with_docs("one. ", "two. ")).text


def test_a_folder_as_store_outlives_the_engine(tmp_path: Path) -> None:
    for expected in (True, False):
        engine = HFEngine(tiny_model(), byte_tokenizer())
        answer = ChatKVCAG(engine=engine, max_tokens=4, store=str(tmp_path)).invoke(with_docs("one. ", "two. " * 20))
        documents_encoded = answer.response_metadata["kvcag"]["encoded_tokens"] > 50
        assert documents_encoded is expected


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("asked", [with_docs("one. ", "two. "), "hello"], ids=["documents", "plain"])
def test_tenants_share_weights_and_nothing_that_was_read(
    tiny_engine: HFEngine, tmp_path: Path, folder: bool, asked: Any
) -> None:
    store = tmp_path if folder else None
    ours, theirs = (ChatKVCAG(engine=tiny_engine, max_tokens=2, namespace=name, store=store) for name in "ab")
    ours.invoke(asked)
    assert read(theirs.invoke(asked)) == 0
    assert read(ours.invoke(asked)) > 0


def test_using_a_cache_never_modifies_it(tiny_engine: HFEngine, tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    llm = ChatKVCAG(engine=tiny_engine, max_tokens=8, store=store)
    llm.invoke(with_docs("one. ", "two. "))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    llm.batch([with_docs("two. ", "one. ", question=q) for q in "abcd"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


# --- how an answer ends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [["light"], ["zzz", "ght m"], ["!", "mor"]])
def test_stop_strings_are_cut_and_never_partly_shown(stop: list[str]) -> None:
    llm = ChatKVCAG(engine=EchoEngine(), max_tokens=100)
    said = "grüße, light more light"
    expected = said[: min(said.find(s) for s in stop if s in said)]
    chunks = [chunk.text for chunk in llm.stream(said, stop=stop)]
    assert "".join(chunks) == expected
    assert llm.invoke(said, stop=stop).response_metadata["finish_reason"] == "stop"
    assert ChatKVCAG(engine=EchoEngine(), stop=stop).invoke(said).text == expected


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_k": 9, "seed": 4}], ids=["greedy", "sampled"])
async def test_log_probabilities_are_the_models_own(tiny_engine: HFEngine, settings: Any) -> None:
    llm = ChatKVCAG(engine=tiny_engine, max_tokens=6, logprobs=True, top_logprobs=3, **settings)
    answer = llm.invoke("hello")
    content = answer.response_metadata["logprobs"]["content"]
    prompt = tiny_engine.template.prompt([{"role": "user", "content": "hello"}]).token_ids
    ids = continued(tiny_engine, prompt, settings)
    assert len(content) == len(ids) == answer.usage_metadata["output_tokens"]
    with torch.no_grad():
        rows = tiny_engine.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for row, token, said in zip(rows, ids, content, strict=True):
        assert said["token"] == tiny_engine.tokenizer.decode([token])
        assert said["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        likeliest = [other["logprob"] for other in said["top_logprobs"]]
        assert likeliest == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    streamed = whole([chunk async for chunk in llm.astream("hello")])
    assert [said["token"] for said in streamed.response_metadata["logprobs"]["content"]] == [
        said["token"] for said in content
    ]
    assert "logprobs" not in llm.invoke("hello", logprobs=False, top_logprobs=None).response_metadata
    assert llm.invoke("hello", top_logprobs=None).response_metadata["logprobs"]["content"][0]["top_logprobs"] == []


def continued(engine: HFEngine, prompt: tuple[int, ...], settings: dict[str, Any]) -> list[int]:
    """The tokens of an answer."""
    sampling = engine.sampling(max_new_tokens=6, **settings)
    return [token for chunk in engine.stream(Prompt((), (), prompt), sampling) for token in chunk.token_ids]


def test_log_probabilities_need_an_engine_that_has_them() -> None:
    with pytest.raises(UnsupportedModelError, match="EchoEngine has no log-probabilities"):
        ChatKVCAG(engine=EchoEngine(), logprobs=True).invoke("hello")
    with pytest.raises(InvalidInputError, match="top_logprobs must be a whole number, 0 to 20"):
        ChatKVCAG(engine=EchoEngine(), top_logprobs=50).invoke("hello")


def test_n_answers_of_one_prompt(tiny_engine: HFEngine) -> None:
    llm = ChatKVCAG(engine=tiny_engine, max_tokens=6, temperature=1.5, seed=1, n=3)
    [answers] = llm.generate([[HumanMessage("hello")]]).generations
    texts = [answer.text for answer in answers]
    assert len(set(texts)) == 3
    assert texts == [llm.invoke("hello", seed=seed, n=1).text for seed in (1, 2, 3)]
    assert llm.invoke("hello").text == texts[0]
    assert [len(some) for some in llm.generate([[HumanMessage("a")], [HumanMessage("b")]], n=2).generations] == [2, 2]
    with pytest.raises(InvalidInputError, match="n=3 answers cannot be streamed"):
        list(llm.stream("hello"))
    with pytest.raises(InvalidInputError, match="n is 0: ask for one answer or more"):
        llm.invoke("hello", n=0)


def test_characters_of_several_tokens_are_never_split() -> None:
    said = "日本語 ünï 🎉"
    chunks = [chunk.text for chunk in ChatKVCAG(engine=EchoEngine(), max_tokens=100).stream(said)]
    assert "".join(chunks) == said
    assert not any("\ufffd" in chunk for chunk in chunks)


def test_an_answer_that_reaches_max_tokens_reports_length() -> None:
    answer = ChatKVCAG(engine=EchoEngine(), max_tokens=4).invoke("abcdefgh")
    assert (answer.text, answer.response_metadata["finish_reason"]) == ("abcd", "length")
    assert answer.usage_metadata["output_tokens"] == 4


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_context_that_is_too_long_is_refused_before_any_work(llm: ChatKVCAG) -> None:
    steps: list[int] = []
    llm.engine.model.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(ContextLengthError, match=r"more than the model's context of 2048. Pass fewer documents"):
        llm.invoke(with_docs("word " * 500, "two"))
    assert not steps
    assert llm.profile["max_input_tokens"] == llm.engine.context_length


def test_an_unknown_argument_is_refused(llm: ChatKVCAG) -> None:
    with pytest.raises(InvalidInputError, match=r"unknown argument tempertaure\. A call takes"):
        llm.invoke("hello", tempertaure=1)


def test_a_model_that_is_no_name_is_refused(llm: ChatKVCAG) -> None:
    with pytest.raises(InvalidInputError, match="model= is a hub id or a folder, not int"):
        llm.invoke("hello", model=7)


def test_an_image_is_refused(llm: ChatKVCAG) -> None:
    image = {"type": "image", "base64": "AAAA", "mime_type": "image/png"}
    with pytest.raises(UnsupportedContentError, match="a text model reads text only"):
        llm.invoke([HumanMessage([{"type": "text", "text": "look"}, image])])


def test_a_model_without_a_chat_template_is_refused() -> None:
    engine = HFEngine(tiny_model(), byte_tokenizer(chat_template=None))
    with pytest.raises(ChatTemplateError, match=r"has no chat template.*Use an instruct model, or set"):
        ChatKVCAG(engine=engine, max_tokens=3).invoke("hello")


# --- the rest of a chat model -----------------------------------------------------------------------------------------


def test_tokens_are_counted_by_the_models_tokenizer(llm: ChatKVCAG) -> None:
    conversation = [SystemMessage("be brief"), HumanMessage("hello")]
    assert llm.get_num_tokens("hellö") == 6
    assert llm.get_num_tokens_from_messages(conversation) == llm.invoke(conversation).usage_metadata["input_tokens"]


def test_settings_can_be_changed_at_run_time(llm: ChatKVCAG) -> None:
    configurable = llm.configurable_fields(max_tokens=ConfigurableField(id="length"))
    asked = with_docs("one. ", "two. ")
    assert configurable.invoke(asked).usage_metadata["output_tokens"] == 8
    short = configurable.with_config(configurable={"length": 2}).invoke(asked)
    assert short.usage_metadata["output_tokens"] == 2
    assert short.response_metadata["kvcag"]["encoded_tokens"] == 0  # the documents are still known


def test_a_fallback_answers_where_the_model_cannot(llm: ChatKVCAG) -> None:
    fallback = llm.with_fallbacks([FakeListChatModel(responses=["from the fallback"])])
    assert fallback.invoke("word " * 1000).text == "from the fallback"


def test_a_rate_limiter_is_asked(tiny_engine: HFEngine) -> None:
    limiter = InMemoryRateLimiter(requests_per_second=1e-3, max_bucket_size=1)
    llm = ChatKVCAG(engine=tiny_engine, max_tokens=2, rate_limiter=limiter)
    limiter.available_tokens = 1.0
    limiter.last = time.monotonic()
    llm.invoke("hello")
    assert limiter.available_tokens < 1


def test_v1_content_is_blocks(tiny_engine: HFEngine) -> None:
    llm = ChatKVCAG(engine=EchoEngine(), max_tokens=20, output_version="v1")
    assert llm.invoke("hello").content == [{"type": "text", "text": "hello"}]
    assert whole(list(llm.stream("hello"))).text == "hello"


def test_ids_of_runs_reach_the_message(llm: ChatKVCAG) -> None:
    run = UUID(int=7)
    assert str(run) in llm.invoke("hello", config={"run_id": run}).id


def test_nothing_warns_in_ordinary_use(llm: ChatKVCAG) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.invoke(with_docs("one. ", "two. "))
