"""VLLMEngine over a server with vLLM's wire format: requests, answers and usage."""

from __future__ import annotations

import threading
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcag import HFEngine
from kvcag.chat_template import Document, Prompt
from kvcag.engines.base import Sampling
from kvcag.engines.vllm.engine import DocumentSorter, VLLMEngine, cache_salt
from kvcag.errors import (
    ContextLengthError,
    EmptyPromptError,
    FingerprintMismatchError,
    InvalidInputError,
    ServerError,
    ServerWarning,
    TokenMismatchError,
    UnsupportedModelError,
)
from kvcag.testing import CHATML, EchoEngine, byte_tokenizer, tiny_model, whole_prompt
from tests.waits import run_together
from tests.wire_server import WireServer

CHAT = [
    {
        "role": "system",
        "content": "Answer from these: the tower was completed in 1889, and it is 330 metres high. " * 4,
    },
    {"role": "user", "content": "When wás it completed?"},
]


def last_usage(engine: VLLMEngine, messages=CHAT, namespace: str = "", **sampling):
    sampling.setdefault("max_new_tokens", 4)
    *_, last = engine.stream(engine.template.prompt(messages), engine.sampling(**sampling), namespace=namespace)
    return last.usage


@pytest.mark.parametrize("local", [True, False], ids=["local tokenizer", "the server's tokenizer"])
def test_greedy_answers_are_those_of_an_hf_engine_with_the_same_weights(server: WireServer, local: bool) -> None:
    here = HFEngine(tiny_model(), byte_tokenizer())
    with VLLMEngine(server.url, tokenizer=byte_tokenizer() if local else None) as engine:
        for length in (1, 17, 40):
            assert engine.generate(CHAT, max_new_tokens=length) == here.generate(CHAT, max_new_tokens=length)
        assert engine.template.prompt(CHAT) == here.template.prompt(CHAT)
        assert server.prompts()[0] == list(here.template.prompt(CHAT).token_ids)


def test_the_two_kinds_of_tokenizer_are_the_same_model(server: WireServer) -> None:
    with VLLMEngine(server.url) as asking, VLLMEngine(server.url, tokenizer=byte_tokenizer()) as holding:
        assert asking.fingerprint.digest == holding.fingerprint.digest
    with VLLMEngine(server.url, tokenizer=byte_tokenizer(CHATML + "!")) as other:
        assert asking.fingerprint.differences(other.fingerprint)[0].startswith("template:")


def test_sampled_answers_are_repeatable_by_their_seed(engine: VLLMEngine) -> None:
    answers = {engine.generate(CHAT, temperature=1.0, seed=seed, max_new_tokens=8) for seed in (1, 1, 2)}
    assert len(answers) == 2


def test_a_server_is_sent_every_setting_so_that_it_takes_none_of_the_models_own(
    server: WireServer, engine: VLLMEngine
) -> None:
    last_usage(engine)
    sent = server.bodies[-1][1]
    assert {name: sent[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} == {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    last_usage(engine, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.1, seed=3, stop=["x"])
    sent = server.bodies[-1][1]
    assert (sent["temperature"], sent["top_k"], sent["top_p"], sent["min_p"]) == (0.5, 7, 0.9, 0.1)
    assert (sent["repetition_penalty"], sent["seed"], sent["stop"]) == (1.1, 3, ["x"])


def test_defaults_hold_unless_a_call_says_otherwise(server: WireServer) -> None:
    with VLLMEngine(server.url, defaults={"temperature": 0.7, "max_new_tokens": 3}) as engine:
        assert engine.sampling(top_k=2) == Sampling(max_new_tokens=3, temperature=0.7, top_k=2)
    with pytest.raises(InvalidInputError, match="warmth"):
        VLLMEngine(server.url, defaults={"warmth": 1})


def test_usage_is_the_servers(engine: VLLMEngine) -> None:
    cold, warm = last_usage(engine), last_usage(engine)
    size = len(engine.template.prompt(CHAT).token_ids)
    assert (cold.prompt_tokens, cold.cached_tokens, cold.created_tokens, cold.completion_tokens) == (size, 0, size, 4)
    assert warm.cached_tokens == (size - 1) // 16 * 16
    assert warm.cached_tokens + warm.created_tokens == warm.prompt_tokens == size
    assert 0 < warm.ttft_s <= warm.total_s


def test_a_prompt_with_documents_says_how_its_context_was_read(engine: VLLMEngine) -> None:
    asked = [{"role": "system", "content": ["Read.\n", Document("One. " * 20), Document("Two. " * 20)]}, CHAT[1]]
    prompt = engine.template.prompt(asked)
    cold, warm = last_usage(engine, asked).context, last_usage(engine, asked).context
    size = len(prompt.context_ids)
    assert (cold.mode, cold.context_tokens, cold.encoded_tokens) == ("encoded", size, size)
    assert (warm.mode, warm.strategy, warm.recomputed_tokens) == ("prefix", "exact", 0)
    assert warm.reused_tokens + warm.encoded_tokens == size
    assert warm.reused_tokens == size  # the tail completes its last block


def test_namespaces_share_no_hit(engine: VLLMEngine) -> None:
    assert last_usage(engine, namespace="a").cached_tokens == 0
    assert last_usage(engine, namespace="b").cached_tokens == 0
    assert last_usage(engine).cached_tokens == 0
    assert last_usage(engine, namespace="a").cached_tokens > 0


def test_salts_cannot_be_made_without_the_secret() -> None:
    assert cache_salt("", "") is None
    salts = {cache_salt(secret, namespace) for secret in ("", "s") for namespace in ("", "a", "b")}
    assert len(salts - {None}) == 5
    assert {len(salt) for salt in salts if salt} == {43}  # 256 bits


def test_stop_strings_end_an_answer_and_are_no_part_of_it() -> None:
    with WireServer(EchoEngine(lambda _: "one two three")) as server, VLLMEngine(server.url) as engine:
        assert engine.generate("?", stop=["two"], max_new_tokens=40) == "one "
        chunks = list(engine.stream(engine.template.prompt(CHAT), engine.sampling(stop="three", max_new_tokens=40)))
    assert "".join(chunk.text for chunk in chunks) == "one two "
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
    assert chunks[-1].usage is not None


def test_a_stop_string_within_the_thinking_stops_nothing_where_thinking_is_left_out() -> None:
    with (
        WireServer(EchoEngine(lambda _: "<think>no answer: yet</think>\n\nThe answer: 1889. More")) as server,
        VLLMEngine(server.url) as engine,
    ):
        answer = engine.generate("?", strip_thinking=True, stop=["answer: yet", "9."], max_new_tokens=99)
        assert answer == "The answer: 188"
        assert "stop" not in server.bodies[-1][1]
        assert engine.generate("?", stop=["answer"], max_new_tokens=99) == "<think>no "


def test_the_budget_ends_an_answer_with_length(engine: VLLMEngine) -> None:
    *_, last = engine.stream(engine.template.prompt(CHAT), engine.sampling(max_new_tokens=3))
    assert last.finish_reason == "length"
    assert last.usage.completion_tokens == 3


def test_what_cannot_work_is_refused_before_anything_is_sent(server: WireServer, engine: VLLMEngine) -> None:
    prompt = engine.template.prompt(CHAT)
    with pytest.raises(ContextLengthError, match="2048"):
        engine.stream(prompt, engine.sampling(max_new_tokens=2000))
    with pytest.raises(EmptyPromptError):
        engine.stream(Prompt((), (), ()), engine.sampling())
    with pytest.raises(InvalidInputError, match="tempo"):
        engine.sampling(tempo=1)
    with pytest.raises(InvalidInputError, match="document_order"):
        VLLMEngine(server.url, document_order="best")
    with pytest.raises(InvalidInputError, match="not a URL"):
        VLLMEngine("127.0.0.1:8000")
    assert not server.prompts()


def test_making_an_engine_needs_no_server() -> None:
    with VLLMEngine("http://127.0.0.1:1/v1", "m", tokenizer=byte_tokenizer(), context_length=100) as engine:
        assert engine.model_name == "m"
        assert engine.check_fits(90, None) == 10
        assert engine.fingerprint.model_name == "m"


# --- contexts ---------------------------------------------------------------------------------------------------


def test_a_context_is_sent_ahead_and_continued(server: WireServer, engine: VLLMEngine) -> None:
    here = HFEngine(tiny_model(), byte_tokenizer())
    text = "The tower was completed in 1889. " * 6
    context, cache = engine.build_vllm_kv_cache(text), here.build_kv_cache(text)
    assert context == byte_tokenizer().decode(cache.token_ids.tolist())
    assert context.token_ids.tolist() == cache.token_ids.tolist() == server.prompts()[0]
    assert [body["max_tokens"] for path, body in server.bodies if path == "/v1/completions"] == [1]
    assert engine.generate("When?", context, max_new_tokens=8) == here.generate("When?", cache, max_new_tokens=8)
    *_, last = engine.stream(engine.build_prompt("When?", context), engine.sampling(max_new_tokens=1), context)
    assert last.usage.cached_tokens >= len(context.token_ids) // 16 * 16


@pytest.mark.parametrize(
    "given", [["one", " ", "two"], CHAT, [*CHAT, {"role": "assistant", "content": "1889."}]], ids=["list", "chat", "qa"]
)
def test_a_context_is_what_hf_engine_makes_of_it(engine: VLLMEngine, given) -> None:
    here = HFEngine(tiny_model(), byte_tokenizer())
    context, cache = engine.build_vllm_kv_cache(given), here.build_kv_cache(given)
    assert context.token_ids.tolist() == cache.token_ids.tolist()
    asked = [{"role": "user", "content": "And then?"}]
    assert engine.build_prompt(asked, context) == here.build_prompt(asked, cache)


def test_a_context_of_another_model_or_another_prompt_is_refused(server: WireServer, engine: VLLMEngine) -> None:
    context = engine.build_vllm_kv_cache("text")
    with pytest.raises(TokenMismatchError, match="begin"):
        engine.stream(engine.template.prompt(CHAT), engine.sampling(), context)
    with (
        VLLMEngine(server.url, tokenizer=byte_tokenizer(CHATML + "!")) as other,
        pytest.raises(FingerprintMismatchError, match="template"),
    ):
        other.generate("?", context)
    with pytest.raises(EmptyPromptError):
        engine.build_vllm_kv_cache(["", " "])
    here = HFEngine(tiny_model(), byte_tokenizer())
    with pytest.raises(UnsupportedModelError, match="server"):
        engine.generate("?", here.build_kv_cache("text"))


def test_documents_in_canonical_order_make_the_same_prompt_in_any_order(server: WireServer) -> None:
    documents = [Document(f"Number {n} is odd. ") for n in (3, 1, 7, 5)]
    asked = [[{"role": "system", "content": ["Read. ", *order]}, CHAT[1]] for order in (documents, documents[::-1])]
    with VLLMEngine(server.url, document_order="canonical") as engine:
        for messages in asked:
            last_usage(engine, messages)
        first, second = server.prompts()
        given = list(engine.template.prompt(asked[0]).token_ids)
        assert first == second
        assert sorted(first) == sorted(given)
    with VLLMEngine(server.url) as engine:
        last_usage(engine, asked[0])
        assert server.prompts()[-1] == given


def documents_of(order: str, asked: list[list[int]]) -> list[list[int]]:
    """The order in which the documents of each question are sent."""
    sorter = DocumentSorter(order)
    prompts = [Prompt((0,), tuple((number,) for number in numbers), (9,)) for numbers in asked]
    return [[ids[0] for ids in sorter.arrange(prompt, count=True).document_ids] for prompt in prompts]


def test_frequent_documents_come_first_once_they_are_frequent() -> None:
    asked = [[1, 2], [3, 2], [4, 2], [2, 5], [6, 2, 1]]
    assert [numbers[0] for numbers in documents_of("frequent", asked)[1:]] == [2, 2, 2, 2]
    assert documents_of("frequent", asked)[-1][1] == 1  # asked for once; 6 never
    assert documents_of("given", asked) == asked


@given(st.lists(st.permutations([1, 2, 3, 4]), min_size=2, max_size=6))
def test_canonical_order_depends_on_nothing_but_the_documents(asked: list[list[int]]) -> None:
    assert len({tuple(numbers) for numbers in documents_of("canonical", asked)}) == 1


@given(st.lists(st.lists(st.integers(1, 30), unique=True, max_size=6), max_size=30))
def test_no_order_loses_a_document(asked: list[list[int]]) -> None:
    for order in ("given", "canonical", "frequent"):
        assert [sorted(numbers) for numbers in documents_of(order, asked)] == [sorted(numbers) for numbers in asked]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=60).filter(str.strip))
def test_any_text_is_the_same_tokens_on_either_side(engine: VLLMEngine, text: str) -> None:
    messages = [{"role": "system", "content": [Document(text)]}, {"role": "user", "content": text}]
    here = HFEngine(tiny_model(), byte_tokenizer())
    assert engine.template.prompt(messages) == here.template.prompt(messages)
    assert engine.template.encode(text) == here.template.encode(text)


# --- other servers ----------------------------------------------------------------------------------------------


def test_any_server_of_the_api_answers_and_what_it_lacks_is_said_once(tiny_engine: HFEngine) -> None:
    here = HFEngine(tiny_model(), byte_tokenizer())
    with (
        WireServer(tiny_engine, flavour="openai", reports=False) as server,
        VLLMEngine(server.url, tokenizer=byte_tokenizer()) as engine,
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            answers = {engine.generate(CHAT, max_new_tokens=9) for _ in range(3)}
            usage = last_usage(engine, namespace="a")
            last_usage(engine, namespace="b")
        assert {warning.category for warning in said} == {ServerWarning}
        assert answers == {here.generate(CHAT, max_new_tokens=9)}
        lacks = [str(warning.message) for warning in said]
        assert len(lacks) == len(set(lacks)) == 4
        for each in (
            "does not report its context length",
            "no /tokenize",
            "does not report cached tokens",
            "no cache salts",
        ):
            assert any(each in one for one in lacks), each
        assert (usage.cached_tokens, usage.created_tokens) == (0, 0)
        assert not {"top_k", "min_p", "repetition_penalty", "cache_salt"} & server.bodies[-1][1].keys()


def test_vllm_without_token_details_is_told_apart_from_one_without_hits(tiny_engine: HFEngine) -> None:
    with WireServer(tiny_engine, reports=False) as server, VLLMEngine(server.url) as engine:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            last_usage(engine)
        with pytest.warns(ServerWarning, match="--enable-prompt-tokens-details"):
            last_usage(engine)


def test_a_server_without_tokenize_needs_a_tokenizer(tiny_engine: HFEngine) -> None:
    with (
        WireServer(tiny_engine, flavour="openai") as server,
        VLLMEngine(server.url) as engine,
        pytest.raises(InvalidInputError, match="Pass tokenizer="),
    ):
        engine.generate("?")


def test_another_models_tokenizer_is_refused(server: WireServer) -> None:
    other = byte_tokenizer()
    other.add_tokens(["tower", "def"])
    with (
        VLLMEngine(server.url, tokenizer=other) as engine,
        pytest.raises(InvalidInputError, match="different token ids"),
    ):
        engine.generate(CHAT)
    assert not server.prompts()


def test_a_model_that_is_not_served_is_named_with_those_that_are(server: WireServer) -> None:
    with VLLMEngine(server.url, "huge") as engine, pytest.raises(InvalidInputError, match="Valid aliases: tiny"):
        engine.generate("?")


def test_the_key_is_sent_and_its_lack_explained(tiny_engine: HFEngine) -> None:
    with WireServer(tiny_engine, api_key="secret") as server:
        with VLLMEngine(server.url, api_key="secret") as engine:
            assert engine.generate(CHAT, max_new_tokens=2) is not None
        with VLLMEngine(server.url) as engine, pytest.raises(ServerError, match="api_key=") as refused:
            engine.generate(CHAT)
        assert refused.value.status == 401


def test_a_template_without_a_system_role_folds_it_into_the_users_turn() -> None:
    refusing = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    with WireServer(HFEngine(tiny_model(), byte_tokenizer(refusing))) as server, VLLMEngine(server.url) as engine:
        assert engine.template.render(CHAT).startswith("[user]Answer from these")


def test_many_threads_share_an_engine(server: WireServer, engine: VLLMEngine) -> None:
    alone = engine.generate(CHAT, max_new_tokens=6)
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(engine.generate(CHAT, max_new_tokens=6))) for _ in range(8)
    ]
    run_together(threads)
    assert answers == [alone] * 8


def test_whole_prompts_reach_the_model() -> None:
    with WireServer(EchoEngine(whole_prompt)) as server, VLLMEngine(server.url) as engine:
        assert engine.generate([{"role": "user", "content": "Wörld?"}]) == "user: Wörld?"
