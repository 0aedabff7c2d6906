"""The connector in a real server: restarts, documents in any order, namespaces, damaged and lost stores."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from langchain_core.messages import HumanMessage, SystemMessage

from kvcag import Document, HFEngine, KVCacheMemory, VLLMEngine
from kvcag.cache.layers import cache_argument, clone
from kvcag.core import Answer, Chunk, MergeSettings, content_key
from kvcag.demo.corpus import python_topics
from kvcag.errors import ServerWarning, UnsupportedModelError
from kvcag.langchain import ChatKVCAG
from kvcag.llama_index import KVCacheLLM
from kvcag.stores.disk import DiskStore
from tests.vllm.vllm_process import Vllm

BLOCK = 32
QUESTIONS = ["What happens when 0.0 is raised to a negative power?", 'What is the "while" statement used for?']
TEXTS = [
    f"{topic.text}\n\n" for topic in python_topics(("break", "pass", "while", "imaginary", "del", "lists", "nonlocal"))
]
CORPUS = "".join(
    f"{topic.text}\n\n" for topic in python_topics(("break", "pass", "while", "imaginary", "del", "lists"))
)
CORPUS += "".join(f"{topic.text}\n\n" for topic in python_topics(("nonlocal", "power")))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def server(smollm2_path: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with Vllm(smollm2_path, log, str(store), max_model_len=4096) as made:
        yield made


@pytest.fixture
def served(server: Vllm, smollm2_path: Path) -> Iterator[VLLMEngine]:
    with VLLMEngine(server.url, tokenizer=smollm2_path) as made:
        yield made


def prefilled(server: Vllm) -> int:
    """Prompt tokens that the server has computed, by its own metrics."""
    text = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
    [count] = re.findall(r'^vllm:prompt_tokens_by_source_total\{.*source="local_compute"\} (\S+)$', text, re.M)
    return int(float(count))


def messages(order: list[int], question: str = QUESTIONS[1]) -> list[dict]:
    documents = ["Answer from this.\n\n", *(Document(TEXTS[at]) for at in order)]
    return [{"role": "system", "content": documents}, {"role": "user", "content": question}]


def ask(memory: KVCacheMemory, order: list[int], **settings: object) -> Chunk:
    *_, last = memory.stream(messages(order), max_new_tokens=4, **settings)
    return last


@pytest.mark.timeout(600)
def test_after_a_restart_the_second_question_prefills_its_tail_only(
    server: Vllm, served: VLLMEngine, figures: Callable[[str], None]
) -> None:
    llm = ChatKVCAG(engine=served, max_tokens=4)
    llm.invoke("Hello?")  # its connection and its first pass
    used = []
    for question in QUESTIONS:
        before = prefilled(server)
        answer = llm.invoke([SystemMessage(f"Answer from this.\n\n{CORPUS}"), HumanMessage(question)])
        used.append((prefilled(server) - before, answer.response_metadata["kvcag"]["ttft_s"], answer.usage_metadata))
        if question == QUESTIONS[0]:
            server.stop()
            server.start()
            llm.invoke("Hello?")
    (cold, cold_s, first), (warm, warm_s, second) = used
    tail = second["input_tokens"] - len(served.template.encode(CORPUS))
    figures(f"connector, restart: prefilled {cold} → {warm} tokens, TTFT {cold_s:.2f} → {warm_s:.2f} s")
    assert first["input_tokens"] >= 1400
    assert cold == first["input_tokens"]
    assert warm <= tail + BLOCK
    assert second["input_token_details"]["cache_read"] == second["input_tokens"] - warm
    assert warm_s <= 0.25 * cold_s


@pytest.mark.timeout(600)
def test_documents_in_a_new_order_prefill_the_tail_and_a_block(
    server: Vllm, served: VLLMEngine, smollm2_path: Path, figures: Callable[[str], None]
) -> None:
    memory = KVCacheMemory(served)
    first = ask(memory, [0, 1, 2, 3, 4], strategy="rotate")
    assert first.usage.context.encoded_tokens >= sum(len(served.template.encode(TEXTS[at])) for at in range(5)) - BLOCK
    with VLLMEngine(server.url, tokenizer=smollm2_path, merge_documents=False, salt_secret="cold") as reading:
        cold = ask(KVCacheMemory(reading), [3, 1, 4, 0, 2])
    assert cold.usage.context.strategy == "exact"
    before = prefilled(server)
    warm = ask(memory, [3, 1, 4, 0, 2], strategy="rotate")
    computed = prefilled(server) - before
    context, tail = warm.usage.context, warm.usage.prompt_tokens - warm.usage.context.context_tokens
    figures(
        f"connector, new order: prefilled {cold.usage.prompt_tokens} → {computed} tokens (tail {tail}), "
        f"TTFT {cold.usage.ttft_s:.2f} → {warm.usage.ttft_s:.2f} s"
    )
    assert computed <= tail + BLOCK
    assert (context.mode, context.strategy) == ("merged", "rotate")
    assert context.reused_tokens == warm.usage.cached_tokens == warm.usage.prompt_tokens - computed
    assert warm.usage.ttft_s <= 0.35 * cold.usage.ttft_s


Logprobs = list[dict[int, float]]
"""Of the likeliest tokens, or of all, at each place of an answer."""


def logprobs(server: Vllm, body: dict, max_tokens: int = 8) -> tuple[list[int], Logprobs]:
    """Greedy tokens, and the likeliest tokens' log-probabilities at each place."""
    asked = {**body, "max_tokens": max_tokens, "logprobs": 2000, "return_tokens_as_token_ids": True}
    answer = httpx.post(f"{server.url}/completions", json=asked, timeout=120).raise_for_status().json()
    [choice] = answer["choices"]

    def id_of(token: str) -> int:
        return int(token.removeprefix("token_id:"))

    likeliest = [{id_of(t): value for t, value in top.items()} for top in choice["logprobs"]["top_logprobs"]]
    return [id_of(token) for token in choice["logprobs"]["tokens"]], likeliest


def kl(ours: Logprobs, theirs: Logprobs) -> float:
    """Nats per token, over the tokens that both have one by one, and all others as one."""
    sums = []
    for mine, other in zip(ours, theirs, strict=True):
        pairs = [(mine[token], other[token]) for token in mine.keys() & other.keys()]
        rest = [max(1e-12, 1 - sum(math.exp(pair[side]) for pair in pairs)) for side in (0, 1)]
        sums.append(sum(math.exp(p) * (p - q) for p, q in pairs) + rest[0] * math.log(rest[0] / rest[1]))
    return sum(sums) / len(sums)


@pytest.mark.timeout(600)
def test_the_answers_logprobs_are_those_of_rotate(
    server: Vllm, served: VLLMEngine, here: HFEngine, figures: Callable[[str], None]
) -> None:
    ask(KVCacheMemory(served), [2, 0, 3, 1, 4], strategy="rotate")  # everything is there
    prompt = here.template.prompt(messages([4, 2, 0, 3, 1]), seams="documents")
    assert prompt == served.template.prompt(messages([4, 2, 0, 3, 1]), seams="documents")
    sent, encoded = served._documents.merging(prompt, "")
    assert not encoded
    body = served._body_of_one(prompt.token_ids, "")
    tokens, merged = logprobs(server, {**body, "cache_salt": sent.salt, "kv_transfer_params": sent.params})
    reference = KVCacheMemory(here, namespace="usual drift")  # for which this machine has not learned another drift
    context = reference.context_for(prompt, MergeSettings("rotate"))

    def rows(ids: tuple[int, ...], **cache: object) -> Logprobs:
        with torch.no_grad():
            logits = here.model(torch.tensor([[*ids, *tokens[:-1]]]), **cache).logits[0, -len(tokens) :]
        return [dict(enumerate(row.tolist())) for row in logits.double().log_softmax(-1)]

    past = cache_argument(here.model, clone(context.cache))
    rotated, full = rows(prompt.tail_ids, **past), rows(prompt.token_ids)
    off, lost = kl(merged, rotated), kl(rotated, full)

    def prefilled_by_the_server(answer: list[int]) -> dict[int, float]:
        asked = {**body, "prompt": [*prompt.token_ids, *answer], "cache_salt": "its own prefill"}
        return logprobs(server, asked, max_tokens=1)[1][0]

    own = [prefilled_by_the_server(tokens[:count]) for count in range(len(tokens))]
    lost_there = kl(merged, own)
    figures(f"connector, KL: {off:.1e} to rotate in this process; to a full prefill {lost_there:.4f}, here {lost:.4f}")
    assert off <= 1e-3
    assert lost_there == pytest.approx(lost, rel=0.05)


def test_namespaces_share_nothing(server: Vllm, served: VLLMEngine) -> None:
    read = []
    for namespace in ("a", "b", "a", "b"):
        last = ask(KVCacheMemory(served, namespace=namespace), [0, 1] if len(read) < 2 else [1, 0])
        read.append(last.usage.context)
    size = read[0].context_tokens
    assert [context.encoded_tokens > size - 2 * BLOCK for context in read] == [True, True, False, False]
    plain = [{"role": "user", "content": CORPUS[:2000]}]
    cached = []
    for namespace in ("a", "b", "a"):
        *_, last = KVCacheMemory(served, namespace=namespace).stream(plain, [], max_new_tokens=1)
        cached.append(last.usage.cached_tokens)
    assert cached[:2] == [0, 0]
    assert cached[2] > 300


def test_other_strategies_are_refused_and_both_adapters_merge(served: VLLMEngine) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot merge by 'query'"):
        ask(KVCacheMemory(served), [0, 1], strategy="query")
    llama = KVCacheLLM(engine=served, max_new_tokens=2, merge_strategy="rotate")
    chat = ChatKVCAG(engine=served, max_tokens=2, merge_strategy="rotate")
    for memory in (llama.memory, chat.memory()):
        assert ask(memory, [1, 2, 0], strategy="rotate").usage.context.mode == "merged"
    with pytest.raises(UnsupportedModelError, match="cannot merge by 'full'"):
        ChatKVCAG(engine=served, merge_strategy="full").memory().ask(messages([0]), strategy="full")


def test_a_flipped_byte_is_recomputed(server: Vllm, served: VLLMEngine, store: Path) -> None:
    memory = KVCacheMemory(served)
    ask(memory, [5, 6], strategy="rotate")
    right = Answer.of(memory.stream(messages([6, 5]), max_new_tokens=8, strategy="exact")).text
    prompt = served.template.prompt(messages([5, 6]), seams="documents")
    file = DiskStore(store).file(content_key(served._documents._model or "", prompt.kept_ids[0]))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert Answer.of(memory.stream(messages([6, 5]), max_new_tokens=8, strategy="rotate")).text == right
    log, context_tokens = server.log.read_text(), len(prompt.context_ids)
    assert f"{file} is damaged" in log
    # Its metrics do not: they count what it planned to load.
    assert f"1 request(s) rescheduled ({context_tokens // BLOCK * BLOCK} tokens affected)" in log
    ask(memory, [5, 6, 4], strategy="rotate")  # shows that the document is gone, and the next question has it encoded
    context = ask(memory, [4, 6, 5], strategy="rotate").usage.context
    assert context.mode == "merged"
    assert len(prompt.kept_ids[0]) <= context.encoded_tokens < context.context_tokens / 2


def test_a_store_that_is_gone_is_done_without(
    server: Vllm, served: VLLMEngine, smollm2_path: Path, store: Path
) -> None:
    """The last test: the store does not come back."""
    memory = KVCacheMemory(served)
    ask(memory, [3, 6], strategy="rotate")
    right = Answer.of(memory.stream(messages([6, 3]), max_new_tokens=8, strategy="exact")).text
    shutil.rmtree(store)
    store.write_text("in its place")
    before = prefilled(server)
    answer = Answer.of(memory.stream(messages([6, 3]), max_new_tokens=8, strategy="rotate"))
    assert answer.text == right
    assert prefilled(server) - before >= answer.usage.prompt_tokens
    with (
        VLLMEngine(server.url, tokenizer=smollm2_path) as late,
        pytest.warns(ServerWarning, match="reads them in order"),
    ):
        assert Answer.of(KVCacheMemory(late).stream(messages([6, 3]), max_new_tokens=8)).text == right
