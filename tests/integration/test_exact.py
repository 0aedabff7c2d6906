"""What the library promises, on the real model: cached answers are the answers of a full prefill, in fp32."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvcag import HFEngine, KVCacheMemory, Sampling
from kvcag.cache.layers import LayerKV, cache_argument, cut, layers_of
from kvcag.cache.merge import Part, merge
from kvcag.chat_template import as_messages
from kvcag.demo.corpus import python_topics
from tests.waits import run_together

HEAD = "Answer from the documents."
ASKED = [
    "What is this about?",
    "Which statement is described first?",
    "What happens when it fails?",
    "Name one keyword.",
    "Is there an example?",
]


@pytest.fixture(scope="module")
def topics() -> list[str]:
    return [document.text[:320] for document in python_topics()][:10]


@torch.no_grad()
def greedy_full(engine: HFEngine, token_ids: tuple[int, ...], answer: list[int]) -> tuple[list[int], torch.Tensor]:
    """What transformers alone answers, greedy, as far as it agrees with an answer, and one token more; and the logits.

    One pass without any cache reads the prompt and the answer. The likeliest tokens after the prompt and after each of
    the answer's tokens are those that it would have given one by one, up to the first that the answer does not have.
    """
    ids = torch.tensor([[*token_ids, *answer]])
    logits = engine.model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0]
    return logits.argmax(-1).tolist(), logits


@torch.no_grad()
def forced(engine: HFEngine, tail: tuple[int, ...], cache: object, tokens: list[int]) -> torch.Tensor:
    """The logits of the same tokens over a cache."""
    fed = torch.tensor([[*tail, *tokens]])
    return engine.model(fed, **cache_argument(engine.model, copy.deepcopy(cache))).logits[0, len(tail) - 1 :]


def generated(engine: HFEngine, prompt: object, steps: int, context: object = None) -> list[int]:
    chunks = engine.stream(prompt, Sampling(max_new_tokens=steps), context)  # type: ignore[arg-type]
    return [token for chunk in chunks for token in chunk.token_ids]


def before_eos(engine: HFEngine, tokens: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in engine.eos_ids), len(tokens))
    return tokens[:end]


def test_exact_answers_are_token_identical_on_fifty_prompts(smollm2_engine: HFEngine, topics: list[str]) -> None:
    engine, steps = smollm2_engine, 8
    largest, prompts = 0.0, 0
    for topic in topics:
        cache = engine.build_kv_cache(topic)
        for question in ASKED:
            prompt = engine.build_prompt(question, cache)
            answer = generated(engine, prompt, steps, cache)
            expected, logits = greedy_full(engine, prompt.token_ids, answer)
            assert answer == before_eos(engine, expected[:steps]), (topic[:40], question)
            largest = max(largest, float((logits - forced(engine, prompt.tail_ids, cache, answer)).abs().max()))
            prompts += 1
    assert prompts >= 50
    assert largest <= 1e-3


def test_two_turns_of_chat_are_token_identical(smollm2_engine: HFEngine, topics: list[str]) -> None:
    engine = smollm2_engine
    for topic in topics[:3]:
        messages = [{"role": "system", "content": topic}, *as_messages("What is this about?")]
        for follow_up in ("Say it in one sentence.", None):
            prompt = engine.build_prompt(messages)
            known, _ = engine.prefixes.match(prompt.token_ids)
            tokens = generated(engine, prompt, 12)
            expected, _ = greedy_full(engine, prompt.token_ids, tokens)
            assert tokens == before_eos(engine, expected[:12])
            if follow_up is None:
                assert known > len(engine.template.encode(topic))  # the first turn was not read again
                break
            answer = engine.tokenizer.decode(tokens)
            messages = [*messages, {"role": "assistant", "content": answer}, *as_messages(follow_up)]


def test_exact_merges_are_token_identical_and_full_recompute_is_a_prefill(
    smollm2_engine: HFEngine, topics: list[str]
) -> None:
    memory = KVCacheMemory(smollm2_engine, instruction=HEAD)
    items = [memory.extract(topic) for topic in topics[:4]]
    memory.add(items)
    for strategy in ("exact", "full"):
        context = memory.merge([item.id for item in items], ASKED[0], strategy=strategy)  # type: ignore[arg-type]
        ids = (*context.token_ids.tolist(), *context.tail_ids.tolist())
        answer = generated(smollm2_engine, smollm2_engine.build_prompt(None, context), 12, context)
        expected, logits = greedy_full(smollm2_engine, ids, answer)
        assert answer == before_eos(smollm2_engine, expected[:12])
        over_cache = forced(smollm2_engine, tuple(context.tail_ids.tolist()), context.cache, answer)
        assert float((logits - over_cache).abs().max()) <= 1e-3


@torch.no_grad()
def encoded_at(engine: HFEngine, token_ids: torch.Tensor, position: int) -> list[LayerKV]:
    """Keys and values of tokens that stand at `position`, with nothing before them."""
    positions = torch.arange(position, position + len(token_ids))[None]
    cache = DynamicCache()
    engine.model(token_ids[None], position_ids=positions, **cache_argument(engine.model, cache), use_cache=True)
    return layers_of(cache)


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_each_key_of_a_merge_sits_at_its_true_position(smollm2_engine: HFEngine, topics: list[str]) -> None:
    """In every layer: a document that was encoded at 0 and moved equals the document encoded where it now stands."""
    documents = [torch.tensor(smollm2_engine.template.encode(topic)) for topic in topics[:3]]
    parts = [Part(ids, encoded_at(smollm2_engine, ids, 0), 0, is_exact=i == 0) for i, ids in enumerate(documents)]
    with smollm2_engine.exclusive() as model:
        merged = merge(model, parts, torch.tensor([1]), strategy="rotate").layers
    start = 0
    for ids in documents:
        there = encoded_at(smollm2_engine, ids, start)
        for got, wanted in zip(cut(merged, start, start + len(ids)), there, strict=True):
            assert off(got[0], wanted[0]) <= 1e-4
            assert off(got[1], wanted[1]) <= 1e-4
        start += len(ids)
    assert merged[0][0].shape[-2] == start


def test_ten_generations_and_four_threads_leave_an_item_as_it_was(smollm2_engine: HFEngine, topics: list[str]) -> None:
    memory = KVCacheMemory(smollm2_engine, instruction=HEAD)
    item = memory.extract(topics[0])
    memory.add(item)
    before = [tensor.clone() for kv in layers_of(item.memory) for tensor in kv]

    def ask(seed: int) -> None:
        cache = memory.get_cache([item.id])
        smollm2_engine.generate(ASKED[seed % 5], cache, temperature=1.0, seed=seed, max_new_tokens=3)
        context = memory.merge([item.id], ASKED[seed % 5], strategy="rotate")
        smollm2_engine.generate(past_key_values=context, max_new_tokens=3)

    for seed in range(6):
        ask(seed)
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6, 10)]
    run_together(threads, seconds=300)
    stored = memory.get(item.id)
    assert stored is not None
    after = [tensor for kv in layers_of(stored.memory) for tensor in kv]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_stored_cache_takes_the_bytes_of_its_tokens(
    smollm2_engine: HFEngine, topics: list[str], tmp_path: Path
) -> None:
    memory = KVCacheMemory(smollm2_engine)
    item = memory.extract(topics[0])
    memory.add(item)
    memory.dump(tmp_path)
    config = smollm2_engine.model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    (file,) = tmp_path.rglob("*.safetensors")
    assert len(item.token_ids) * per_token <= file.stat().st_size <= 1.01 * len(item.token_ids) * per_token
