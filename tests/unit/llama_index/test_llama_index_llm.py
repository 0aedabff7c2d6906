"""KVCacheLLM: the eight methods, their settings, usage, closing of streams, and serialisation."""

import asyncio
import json
import pickle
import threading
from collections.abc import Awaitable, Callable, Generator
from itertools import islice
from typing import Any

import pytest
import torch
from llama_index.core.base.llms.types import CacheControl, CachePoint, ChatMessage, TextBlock, ThinkingBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import PromptTemplate
from tokenizers.processors import TemplateProcessing

from kvcag import HFEngine
from kvcag.chat_template import ChatTemplate
from kvcag.core import Chunk
from kvcag.errors import CacheWarning, ContextLengthError, EngineError, InvalidInputError
from kvcag.llama_index import KVCacheLLM
from kvcag.stores.disk import DiskStore
from kvcag.testing import CHATML, EchoEngine, byte_tokenizer, tiny_model, whole_prompt
from tests.waits import auntil, awaited

Way = Callable[..., Awaitable[str]]


def user(text: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=text)]


async def by_chat(llm: KVCacheLLM, text: str, **settings: Any) -> str:
    return llm.chat(user(text), **settings).message.content or ""


async def by_achat(llm: KVCacheLLM, text: str, **settings: Any) -> str:
    return (await llm.achat(user(text), **settings)).message.content or ""


async def by_stream_chat(llm: KVCacheLLM, text: str, **settings: Any) -> str:
    return "".join(response.delta or "" for response in llm.stream_chat(user(text), **settings))


async def by_astream_chat(llm: KVCacheLLM, text: str, **settings: Any) -> str:
    return "".join([response.delta or "" async for response in await llm.astream_chat(user(text), **settings)])


async def by_complete(llm: KVCacheLLM, text: str, **settings: Any) -> str:
    return llm.complete(text, **settings).text


async def by_acomplete(llm: KVCacheLLM, text: str, **settings: Any) -> str:
    return (await llm.acomplete(text, **settings)).text


async def by_stream_complete(llm: KVCacheLLM, text: str, **settings: Any) -> str:
    return "".join(response.delta or "" for response in llm.stream_complete(text, **settings))


async def by_astream_complete(llm: KVCacheLLM, text: str, **settings: Any) -> str:
    return "".join([response.delta or "" async for response in await llm.astream_complete(text, **settings)])


CHAT_WAYS = [by_chat, by_achat, by_stream_chat, by_astream_chat]
COMPLETION_WAYS = [by_complete, by_acomplete, by_stream_complete, by_astream_complete]
WAYS = CHAT_WAYS + COMPLETION_WAYS
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def echo() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def llm(echo: EchoEngine) -> KVCacheLLM:
    return KVCacheLLM(engine=echo)


# --- the eight methods ---------------------------------------------------------------------------------------------


def test_it_is_a_function_calling_llm_with_a_stable_name(llm: KVCacheLLM) -> None:
    assert isinstance(llm, FunctionCallingLLM)
    assert llm.class_name() == "KVCacheLLM"


@every_way
async def test_every_method_gives_the_engines_answer(llm: KVCacheLLM, way: Way) -> None:
    assert await way(llm, "Grüße, 世界!") == "Grüße, 世界!"


async def test_all_methods_agree_on_a_real_model(tiny_engine: HFEngine) -> None:
    llm = KVCacheLLM(engine=tiny_engine, max_new_tokens=12)
    assert len({await way(llm, "abc") for way in WAYS}) == 1


async def test_all_methods_render_the_same_prompt(echo: EchoEngine, llm: KVCacheLLM) -> None:
    for way in WAYS:
        await way(llm, "Hi")
    assert {token_ids for _, token_ids in echo.prompts} == {
        echo.template.prompt([{"role": "user", "content": "Hi"}]).token_ids
    }


def test_predict_and_stream_go_through_chat(llm: KVCacheLLM) -> None:
    template = PromptTemplate("Say {what}.")
    assert llm.predict(template, what="yes") == "Say yes."
    assert "".join(llm.stream(template, what="yes")) == "Say yes."


@pytest.mark.parametrize("way", COMPLETION_WAYS)
async def test_a_formatted_prompt_is_taken_as_it_is(echo: EchoEngine, llm: KVCacheLLM, way: Way) -> None:
    text = "<|im_start|>user\nDeep<|im_end|>\n<|im_start|>assistant\n"
    assert await way(llm, text, formatted=True) == "Deep"
    assert echo.tokenizer.decode(list(echo.prompts[-1][1]), skip_special_tokens=False) == text


@pytest.mark.parametrize("formatted", [True, False])
@pytest.mark.parametrize("text", ["Once", "<|im_start|>Once"])
def test_a_completion_begins_with_exactly_one_bos(formatted: bool, text: str) -> None:
    tokenizer = byte_tokenizer(chat_template=None)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    template = KVCacheLLM(engine=HFEngine(tiny_model(), tokenizer)).engine.template
    prompt = template.verbatim(text) if formatted else template.prompt([{"role": "user", "content": "Once"}])
    assert prompt.token_ids == (bos, *template.encode("Once"))


@pytest.mark.parametrize("way", COMPLETION_WAYS)
async def test_an_empty_prompt_is_an_empty_message(echo: EchoEngine, llm: KVCacheLLM, way: Way) -> None:
    """Like LlamaIndex's `MockLLM`, whose stream has one empty response."""
    assert await way(llm, "") == ""
    assert [token_ids for _, token_ids in echo.prompts] == [
        echo.template.prompt([{"role": "user", "content": ""}]).token_ids
    ]
    assert [(response.text, response.delta) for response in llm.stream_complete("")] == [("", "")]


@pytest.mark.parametrize("way", COMPLETION_WAYS)
@pytest.mark.parametrize("prompt", [None, 7])
async def test_a_missing_prompt_is_a_value_error(llm: KVCacheLLM, way: Way, prompt: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message is the decorator's or ours
        await way(llm, prompt)
    with pytest.raises(ValueError, match="No prompt"):
        llm.complete()


def test_nothing_to_answer_is_a_value_error(llm: KVCacheLLM) -> None:
    with pytest.raises(ValueError, match="at least one user message"):
        llm.chat([])


async def test_the_last_response_of_a_stream_is_not_empty_and_has_the_usage(llm: KVCacheLLM) -> None:
    streams = [
        list(llm.stream_chat(user("Hello"))),
        [response async for response in await llm.astream_chat(user("Hello"))],
        list(llm.stream_complete("Hello")),
        [response async for response in await llm.astream_complete("Hello")],
    ]
    for responses in streams:
        assert [response.delta for response in responses] == list("Hello")
        assert [response.raw is not None for response in responses] == [False] * 4 + [True]
        assert responses[-1].raw["usage"]["completion_tokens"] == 5
        assert responses[-1].raw["finish_reason"] == "stop"


async def test_streams_of_text_have_no_empty_piece(llm: KVCacheLLM) -> None:
    template = PromptTemplate("Say {what}.")
    pieces = list(llm.stream(template, what="yes"))
    assert pieces == [piece async for piece in await llm.astream(template, what="yes")]
    assert all(pieces)


# --- thinking ------------------------------------------------------------------------------------------------------


async def test_thinking_is_a_block_of_its_own() -> None:
    llm = KVCacheLLM(engine=EchoEngine(lambda prompt: "<think>Is it?\n</think>\n\nIt is."))
    streamed = list(llm.stream_chat(user("Is it?")))
    astreamed = [response async for response in await llm.astream_chat(user("Is it?"))]
    for response in (llm.chat(user("Is it?")), await llm.achat(user("Is it?")), streamed[-1], astreamed[-1]):
        assert response.message.blocks == [ThinkingBlock(content="Is it?\n"), TextBlock(text="It is.")]
        assert response.message.content == "It is."
    assert "".join(response.additional_kwargs.get("thinking_delta", "") for response in streamed) == "Is it?\n"
    assert llm.complete("Is it?").text == "It is."
    assert [by.text for by in llm.stream_complete("Is it?")][-1] == "It is."


def test_thinking_can_be_left_out_and_is_read_from_the_prompt_that_opens_it() -> None:
    opened = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    engine = EchoEngine(lambda prompt: "hm</think>Yes.")
    engine.template = ChatTemplate(byte_tokenizer(opened))
    assert KVCacheLLM(engine=engine).chat(user("?")).message.blocks == [
        ThinkingBlock(content="hm"),
        TextBlock(text="Yes."),
    ]
    silent = KVCacheLLM(engine=engine, strip_thinking=True)
    assert silent.chat(user("?")).message.blocks == [TextBlock(text="Yes.")]
    assert not any(response.additional_kwargs for response in silent.stream_chat(user("?")))


# --- settings ------------------------------------------------------------------------------------------------------


@every_way
async def test_settings_of_a_call_take_effect(llm: KVCacheLLM, way: Way) -> None:
    assert await way(llm, "abcdef", max_new_tokens=3) == "abc"
    assert await way(llm, "abcdef", max_tokens=2) == "ab"
    assert await way(llm, "abcdef", stop="d") == await way(llm, "abcdef", stop=["d", "z"]) == "abc"


def test_settings_of_the_llm_hold_unless_a_call_says_otherwise(echo: EchoEngine) -> None:
    llm = KVCacheLLM(engine=echo, max_new_tokens=3, stop=["b"])
    assert llm.complete("abcdef").text == "a"
    assert llm.complete("acdef").text == "acd"
    assert llm.complete("acdef", max_tokens=4, stop=["f"]).text == "acde"
    assert llm.metadata.num_output == 3


def test_temperature_and_seed_take_effect(tiny_engine: HFEngine) -> None:
    llm = KVCacheLLM(engine=tiny_engine, max_new_tokens=12)
    greedy = llm.complete("abc").text
    warm = [llm.complete("abc", temperature=5.0, seed=seed).text for seed in (1, 1, 2)]
    assert warm[0] == warm[1]
    assert len({greedy, *warm}) == 3


@every_way
async def test_unknown_settings_are_refused_at_once(echo: EchoEngine, llm: KVCacheLLM, way: Way) -> None:
    with pytest.raises(InvalidInputError, match="tempo"):
        await way(llm, "x", tempo=1)
    with pytest.raises(InvalidInputError, match="max_new_tokens"):
        await way(llm, "x", max_new_tokens=0)
    assert echo.prompts == []


async def test_asynchronous_streams_refuse_before_they_are_read(llm: KVCacheLLM) -> None:
    with pytest.raises(InvalidInputError, match="tempo"):
        await llm.astream_chat(user("x"), tempo=1)
    with pytest.raises(ContextLengthError):
        await llm.astream_chat(user("x"), max_new_tokens=1 << 20)


def test_wrong_arguments_of_an_llm_are_refused(echo: EchoEngine) -> None:
    with pytest.raises(InvalidInputError, match="no model"):
        KVCacheLLM()
    for wrong in ({"context_window": 0}, {"namespace": 3}, {"stop": "text"}, {"dtype": 7}):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):  # pydantic's error came
            KVCacheLLM(engine=echo, **wrong)
    with pytest.raises(InvalidInputError, match="model= is a hub id or a folder, not int"):
        KVCacheLLM(7)
    with pytest.raises(InvalidInputError, match=r"revision\. Known arguments: .*context_window.*model_kwargs.*such as"):
        KVCacheLLM(engine=echo, revision="main")


@pytest.mark.parametrize("name", ["messages_to_prompt", "completion_to_prompt"])
def test_functions_that_would_take_the_chat_templates_place_are_refused(echo: EchoEngine, name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{name} would not be used: the model's own chat template"):
        KVCacheLLM(engine=echo, **{name: str})
    assert KVCacheLLM(engine=echo, **{name: None}).complete("Hi").text == "Hi"


def test_an_unknown_setting_is_told_all_that_are_known(llm: KVCacheLLM) -> None:
    known = "max_kl.*max_new_tokens.*max_tokens.*merge_strategy.*recompute_ratio.*stop.*temperature.*tool_choice"
    with pytest.raises(InvalidInputError, match=f"unknown argument tempo. Known arguments: .*{known}"):
        llm.complete("x", tempo=1)


def test_the_context_window_can_be_less_than_the_models() -> None:
    llm = KVCacheLLM(engine=EchoEngine(context_length=4096), context_window=1000)
    assert (llm.metadata.context_window, llm.metadata.num_output) == (1000, 250)
    assert json.loads(llm.to_json())["context_window"] == 1000


# --- asynchronous, streaming, closing -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [by_achat, by_astream_chat, by_acomplete, by_astream_complete])
async def test_the_event_loop_ticks_while_the_engine_works(way: Way) -> None:
    ticked = threading.Event()

    def answer(prompt: str) -> str:
        return "free" if ticked.wait(5) else "blocked"

    task = asyncio.create_task(way(KVCacheLLM(engine=EchoEngine(answer)), "x"))
    for _ in range(5):
        await asyncio.sleep(0.001)
    ticked.set()
    assert await awaited(task) == "free"


class Watched(EchoEngine):
    """Counts its chunks, and fails at a given chunk."""

    def __init__(self, fails_after: int = 1 << 30) -> None:
        super().__init__()
        self.given = 0
        self.closed = threading.Event()
        self.fails_after = fails_after

    def stream(self, *args: Any, **kwargs: Any) -> Generator[Chunk, None, None]:
        chunks = super().stream(*args, **kwargs)

        def watched() -> Generator[Chunk, None, None]:
            try:
                for chunk in chunks:
                    if self.given >= self.fails_after:
                        raise EngineError("the card fell off the bus")
                    self.given += 1
                    yield chunk
            finally:
                self.closed.set()

        return watched()


@pytest.mark.parametrize("method", ["stream_chat", "stream_complete"])
def test_closing_a_stream_stops_the_engine(method: str) -> None:
    engine = Watched()
    llm = KVCacheLLM(engine=engine)
    stream = getattr(llm, method)(user("x" * 500) if "chat" in method else "x" * 500)
    assert [response.delta for response in islice(stream, 3)] == ["x"] * 3
    stream.close()
    assert engine.closed.is_set()
    assert engine.given <= 5


@pytest.mark.parametrize("method", ["astream_chat", "astream_complete"])
async def test_closing_an_asynchronous_stream_stops_the_engine(method: str) -> None:
    engine = Watched()
    llm = KVCacheLLM(engine=engine)
    stream = await getattr(llm, method)(user("x" * 500) if "chat" in method else "x" * 500)
    async for _ in stream:
        break
    await stream.aclose()
    assert await asyncio.to_thread(engine.closed.wait, 5)
    assert engine.given <= 3


async def test_cancelling_achat_stops_the_engine() -> None:
    engine = Watched()
    task = asyncio.create_task(KVCacheLLM(engine=engine).achat(user("x" * 50_000)))
    await auntil(lambda: engine.given >= 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await awaited(task)
    assert await asyncio.to_thread(engine.closed.wait, 5)
    assert engine.given < 50_000


@every_way
async def test_an_engine_error_reaches_the_caller(way: Way) -> None:
    with pytest.raises(EngineError, match="fell off"):
        await asyncio.wait_for(way(KVCacheLLM(engine=Watched(fails_after=2)), "x" * 10), timeout=5)


# --- usage and caches -----------------------------------------------------------------------------------------------


@every_way
async def test_the_last_response_holds_the_usage(echo: EchoEngine, way: Way) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: [0] * 1_000_000)
    llm = KVCacheLLM(engine=echo, callback_manager=CallbackManager([counter]))
    await way(llm, "Hello")
    prompt = echo.template.prompt([{"role": "user", "content": "Hello"}])
    assert counter.prompt_llm_token_count == len(prompt.token_ids)
    assert counter.completion_llm_token_count == len(b"Hello")


def test_usage_counts_cached_tokens(tiny_engine: HFEngine) -> None:
    llm = KVCacheLLM(engine=tiny_engine, max_new_tokens=4)
    first, second = (llm.chat(user("abc")).raw["usage"] for _ in range(2))
    assert first["prompt_tokens"] == second["prompt_tokens"]
    assert first["total_tokens"] == first["prompt_tokens"] + first["completion_tokens"]
    assert (first["cached_tokens"], second["cached_tokens"]) == (0, second["prompt_tokens"] - 1)
    assert second["prompt_tokens_details"] == {"cached_tokens": second["cached_tokens"]}  # as OpenAI's


def pointed(corpus: str, question: str) -> list[ChatMessage]:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    return [ChatMessage(role="user", blocks=[TextBlock(text=corpus), point, TextBlock(text=question)])]


def test_a_cache_point_is_exact_and_outlives_the_engine(tmp_path) -> None:
    corpus = "The tower is 330 metres tall. " * 8

    def ask(messages: list[ChatMessage], store: Any) -> Any:
        engine = HFEngine(tiny_model(), byte_tokenizer())
        return KVCacheLLM(engine=engine, store=store, max_new_tokens=12).chat(messages)

    plain = ask(user(f"{corpus}\nHow tall?"), None)
    cold = ask(pointed(corpus, "How tall?"), tmp_path)
    warm = ask(pointed(corpus, "How tall?"), tmp_path)
    assert plain.message.content == cold.message.content == warm.message.content
    assert warm.raw["usage"]["cached_tokens"] >= len(corpus) > cold.raw["usage"]["cached_tokens"] == 0
    assert warm.raw["usage"]["context"]["mode"] == "prefix"
    assert warm.raw["usage"]["context"]["recomputed_tokens"] == 0


@pytest.mark.parametrize("as_object", [True, False])
def test_a_store_is_an_object_or_a_folder(tmp_path, tiny_engine: HFEngine, as_object: bool) -> None:
    store = DiskStore(tmp_path) if as_object else tmp_path
    KVCacheLLM(engine=tiny_engine, store=store, max_new_tokens=2).chat(pointed("abc", "d"))
    assert len(list(DiskStore(tmp_path).keys())) == 1


@pytest.mark.parametrize(
    ("model", "template", "differs"),
    [
        ({"seed": 1}, CHATML, "weights"),
        ({"dtype": torch.bfloat16}, CHATML, "dtype: bfloat16, not float32"),
        ({}, CHATML.replace("assistant", "bot"), "template"),
    ],
)
def test_a_store_of_another_model_dtype_or_template_is_not_used_and_said_so(tmp_path, model, template, differs) -> None:
    ours, other = HFEngine(tiny_model(), byte_tokenizer()), HFEngine(tiny_model(**model), byte_tokenizer(template))
    KVCacheLLM(engine=other, store=tmp_path, max_new_tokens=2).chat(pointed("abc " * 20, "d"))
    with pytest.warns(CacheWarning, match=f"another model .*{differs}"):
        answer = KVCacheLLM(engine=ours, store=tmp_path, max_new_tokens=8).chat(pointed("abc " * 20, "d"))
    assert answer.raw["usage"]["cached_tokens"] == 0
    fresh = KVCacheLLM(engine=HFEngine(tiny_model(), byte_tokenizer()), max_new_tokens=8)
    assert answer.message.content == fresh.chat(user("abc " * 20 + "\nd")).message.content


# --- what is serialised, what templates allow -------------------------------------------------------------------------


def test_only_settings_are_serialised(tmp_path, tiny_engine: HFEngine) -> None:
    llm = KVCacheLLM("a/model", store=tmp_path, temperature=0.5, model_kwargs={"token": "hf_secret"})
    data = json.loads(llm.to_json())
    assert "hf_secret" not in llm.to_json()
    assert (data["model"], data["store"], data["temperature"]) == ("a/model", str(tmp_path), 0.5)
    assert KVCacheLLM.from_dict(data).to_dict() == llm.to_dict()
    assert pickle.loads(pickle.dumps(llm)).to_dict() == llm.to_dict()
    live = KVCacheLLM(engine=tiny_engine, max_new_tokens=2)
    live.chat(user("x"))
    assert all(isinstance(value, str | int | float | None) for value in json.loads(live.to_json()).values())


NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def test_a_template_without_a_system_role_still_reads_it() -> None:
    llm = KVCacheLLM(engine=HFEngine(tiny_model(), byte_tokenizer(NO_SYSTEM)), max_new_tokens=2)
    system = ChatMessage(role="system", content="Be brief.")
    assert llm.count_tokens([system, *user("Hi")]) == llm.count_tokens(user("Be brief.\n\nHi"))
    assert llm.chat([system, *user("Hi")]).raw["usage"]["prompt_tokens"] == llm.count_tokens([system, *user("Hi")])


def test_two_system_messages_are_one() -> None:
    llm = KVCacheLLM(engine=EchoEngine(whole_prompt), system_prompt="Be brief.")
    template = PromptTemplate("{x}")
    assert llm.predict(template, x="Hi") == "system: Be brief.\nuser: Hi"
    messages = [ChatMessage(role="system", content="And kind."), *user("Hi")]
    assert llm.chat(llm._extend_messages(messages)).message.content == "system: Be brief.\n\nAnd kind.\nuser: Hi"


def test_a_model_without_a_chat_template_completes() -> None:
    llm = KVCacheLLM(engine=HFEngine(tiny_model(), byte_tokenizer(chat_template=None)), max_new_tokens=4)
    assert not llm.metadata.is_chat_model
    assert llm.predict(PromptTemplate("{x}"), x="Once") == llm.complete("Once").text
