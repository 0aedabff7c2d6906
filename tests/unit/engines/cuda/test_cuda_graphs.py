"""Answers through captured passes are the answers without them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)


from kvcag import HFEngine, KVCacheMemory, Sampling
from kvcag.cache.layers import cut, generation_cache, layers_of
from kvcag.engines.cuda.graphs import SIZES
from kvcag.testing import byte_tokenizer, tiny_model
from tests.with_and_without_graphs import MIXED, engines

FAMILIES = {
    "llama": {},
    "llama eager": {"attn_implementation": "eager"},
    "llama, head size 128": {"head_dim": 128},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma": {},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": MIXED},
    "phi": {},
    "phi3": {"sliding_window": 16},
    "gpt_neox": {},
    "granite": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "glm": {},
    "cohere": {},
    "gpt_oss": {"sliding_window": 16, "layer_types": MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
MAY_FALL_BACK = {"gpt_oss", "qwen3_moe"}  # experts may wait for the device
TEXT = "Alice has a red bicycle. Bob has a green car. " * 8
ASK = [{"role": "user", "content": "What does Bob have?"}]


def answer(engine: HFEngine, cache: object = None, messages: object = ASK, **sampling: object) -> list[int]:
    chunks = engine.stream(engine.build_prompt(messages, cache), Sampling.of(**sampling), cache)
    return [token for chunk in chunks for token in chunk.token_ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_the_same(family):
    name = family.split()[0].rstrip(",")
    fast, plain = engines(name, **FAMILIES[family])
    answers = [answer(each, each.build_kv_cache(TEXT), max_new_tokens=48) for each in (fast, plain)]
    assert answers[0] == answers[1]
    assert fast._graphs is not None or name in MAY_FALL_BACK, repr(fast)


def test_graphs_serve_all_generations():
    fast, plain = engines()
    for text in ("One.", TEXT, TEXT * 5, "Two."):
        for count in (3, 40):
            got, right = (answer(each, each.build_kv_cache(text), max_new_tokens=count) for each in (fast, plain))
            assert got == right
    assert set(fast._graphs._passes) <= {(1, size) for size in SIZES}
    assert "cuda_graphs=True" in repr(fast)
    assert "cuda_graphs=False" in repr(plain)


@pytest.mark.parametrize("extra", [0, 1, 15, 16, 17, 200, 250])
def test_questions_of_any_length(extra):
    fast, plain = engines()
    asked = [{"role": "user", "content": "x" * extra}]
    got, right = (answer(each, each.build_kv_cache(TEXT), asked, max_new_tokens=8) for each in (fast, plain))
    assert got == right


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.8}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2}]
)
def test_a_seed_draws_the_same(settings):
    fast, plain = engines()
    got, right = (answer(e, e.build_kv_cache(TEXT), max_new_tokens=32, seed=3, **settings) for e in (fast, plain))
    assert got == right


def test_merged_contexts():
    answers = []
    for engine in engines("qwen3"):
        memory = KVCacheMemory(engine, instruction="Answer.")
        ids = memory.add([memory.extract(text * 6) for text in ("The sky is blue. ", "Grass is green. ")])
        context = memory.merge(ids, "What is green?", strategy="query", ratio=0.2)
        answers.append(answer(engine, context, None, max_new_tokens=24))
    assert answers[0] == answers[1]


def test_stop_strings_and_what_is_kept():
    for stop in ("a", "e", " "):
        texts = []
        for engine in engines():
            cache = engine.build_kv_cache(TEXT)
            texts.append(engine.generate(ASK, cache, max_new_tokens=40, stop=stop, temperature=1.0, seed=1))
            texts.append(engine.generate(ASK, cache, max_new_tokens=40, temperature=1.0, seed=1))
        assert texts[:2] == texts[2:]


def test_closing_a_stream_leaves_the_next_right():
    fast, plain = engines()
    stream = fast.stream(fast.build_prompt(ASK), Sampling(max_new_tokens=50))
    for _ in range(5):
        next(stream)
    stream.close()
    assert answer(fast, max_new_tokens=50) == answer(plain, max_new_tokens=50)


def test_threads_answer_as_one_does():
    fast, plain = engines()
    caches = [each.build_kv_cache(TEXT) for each in (fast, plain)]
    asked = [[{"role": "user", "content": f"Question {i}?"}] for i in range(8)]
    right = [answer(plain, caches[1], each, max_new_tokens=24) for each in asked]
    got: dict[int, list[int]] = {}

    def run(index: int) -> None:
        got[index] = answer(fast, caches[0], asked[index], max_new_tokens=24)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got[i] for i in range(8)] == right


def test_a_conversation_goes_on_over_what_was_launched_ahead():
    texts = []
    for engine in engines():
        first = {"role": "user", "content": "One?"}
        said = engine.generate([first], max_new_tokens=9)
        reply = {"role": "assistant", "content": said}
        texts.append([engine.generate([*before, {"role": "user", "content": "Two?"}], max_new_tokens=9)
                      for before in ([first, reply], [])])  # fmt: skip
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    model = tiny_model("qwen3", hidden_size=256, head_dim=64, num_hidden_layers=6).to("cuda", dtype)
    logits = []
    for graphs in (True, False):
        engine = HFEngine(model, byte_tokenizer(), cuda_graphs=graphs)
        layers, _ = engine.prefill(list(range(100)))
        cache = generation_cache([layers], room=64)
        logits.append([engine.forward(list(range(30)), cache).float(), engine.forward([7], cache).float()])
    for got, right in zip(*logits, strict=True):
        assert float((got - right).norm() / right.norm()) < 1e-2


def cached(engine: HFEngine, texts: list[str]) -> list[object]:
    return [engine.build_kv_cache(text) for text in texts]


def at_once(engine: HFEngine, caches: list[object], **sampling: object) -> list[list[int]]:
    with ThreadPoolExecutor(len(caches)) as threads:
        asked = [[{"role": "user", "content": f"Question {i}?"}] for i in range(len(caches))]
        running = [
            threads.submit(answer, engine, cache, messages, **sampling)
            for cache, messages in zip(caches, asked, strict=True)
        ]
        return [future.result(60) for future in running]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_at_once_over_different_contexts(family):
    name = family.split()[0].rstrip(",")
    fast, plain = engines(name, **FAMILIES[family])
    texts = [TEXT * n for n in (1, 2, 3, 1, 4)]
    caches = cached(fast, texts)
    right = [
        answer(plain, cache, [{"role": "user", "content": f"Question {i}?"}], max_new_tokens=32)
        for i, cache in enumerate(cached(plain, texts))
    ]
    assert at_once(fast, caches, max_new_tokens=32) == right
    if fast._graphs is not None and name not in MAY_FALL_BACK:
        assert fast._graphs.alone is None
        assert any(sequences > 1 for sequences, _ in fast._graphs._passes)


@pytest.mark.parametrize("count", [2, 9, 40])
def test_many_answers_over_one_context_that_is_held_once(count):
    fast, plain = engines("qwen3")
    cache, theirs = fast.build_kv_cache(TEXT * 4), plain.build_kv_cache(TEXT * 4)
    right = [
        answer(plain, theirs, [{"role": "user", "content": f"Question {i}?"}], max_new_tokens=24) for i in range(count)
    ]
    assert at_once(fast, [cache] * count, max_new_tokens=24) == right


def test_a_context_is_read_where_it_lies_and_copied_when_it_must_be():
    fast, plain = engines("qwen3")
    got = []
    for engine in (fast, plain):
        layers, _ = engine.prefill(list(range(3, 253)) * 2)
        own = generation_cache([cut(layers, 0, 30), cut(layers, 30, 480), cut(layers, 480)], room=64, lent=True)
        found = [engine.forward(list(range(20)), own), engine.forward([7], own)]
        found.append(engine.forward([5] * 300, own))  # too long for a graph
        found.append(engine.forward([7], own))
        got.append((found, layers_of(own)))
    for logits in zip(got[0][0], got[1][0], strict=True):
        assert torch.allclose(*logits, atol=1e-4)
    for ours, theirs in zip(got[0][1], got[1][1], strict=True):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def test_sampled_answers_at_once():
    fast, plain = engines()
    caches = cached(fast, [TEXT] * 4)
    settings = {"temperature": 0.8, "top_k": 20, "seed": 5, "max_new_tokens": 24}
    right = [
        answer(plain, cache, [{"role": "user", "content": f"Question {i}?"}], **settings)
        for i, cache in enumerate(cached(plain, [TEXT] * 4))
    ]
    assert at_once(fast, caches, **settings) == right


def test_cancelling_half_leaves_the_others_as_they_were():
    fast, _ = engines("qwen3")
    caches = cached(fast, [TEXT * (1 + i % 3) for i in range(8)])
    whole = at_once(fast, caches, max_new_tokens=60)

    def read(i: int) -> list[int]:
        prompt = fast.build_prompt([{"role": "user", "content": f"Question {i}?"}], caches[i])
        stream, found = fast.stream(prompt, Sampling(max_new_tokens=60), caches[i]), []
        for chunk in stream:
            found += chunk.token_ids
            if i % 2 and len(found) >= 5 + 3 * i:
                stream.close()
        return found

    with ThreadPoolExecutor(8) as threads:
        got = [future.result(60) for future in [threads.submit(read, i) for i in range(8)]]
    assert got[::2] == whole[::2]
    assert all(whole[i][: len(got[i])] == got[i] for i in range(1, 8, 2))
