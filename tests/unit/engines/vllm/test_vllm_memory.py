"""KVCacheMemory over a server: items are prompts, and a merge is the prompt of all of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from kvcag import HFEngine, KVCacheMemory, TextualMemoryItem, VLLMKVCacheItem
from kvcag.chat_template import Document
from kvcag.core import ContextPrompt, ServedContext
from kvcag.engines.vllm.engine import VLLMEngine
from kvcag.errors import (
    ContextLengthError,
    EmptyPromptError,
    FingerprintMismatchError,
    InvalidInputError,
    UnknownItemError,
    UnsupportedModelError,
)
from kvcag.stores import DiskStore
from kvcag.testing import CHATML, byte_tokenizer, tiny_model
from tests.wire_server import WireServer

HEAD = "Answer from the documents."
TEXTS = ["The tower was completed in 1889. " * 3, "It is 330 metres high. " * 3, "It stands in Paris. " * 3]


@pytest.fixture
def memory(engine: VLLMEngine) -> KVCacheMemory:
    return KVCacheMemory(engine, instruction=HEAD)


def filled(memory: KVCacheMemory) -> list[str]:
    items = [memory.extract(text) for text in TEXTS]
    memory.add(items)
    return [item.id for item in items]


def test_an_item_is_the_prompt_that_the_server_was_sent(server: WireServer, memory: KVCacheMemory) -> None:
    item = memory.extract(TEXTS[0])
    assert isinstance(item, VLLMKVCacheItem)
    assert item.memory == f"<|im_start|>system\n{HEAD}\n\n{TEXTS[0]}\n\n"
    assert server.prompts() == [byte_tokenizer()(item.memory)["input_ids"]]
    assert item.metadata["source_text"] == item.records.composed_text_memory == TEXTS[0]
    assert item.base_position + len(item.token_ids) == len(server.prompts()[0])
    assert memory.get(item.id) is None


def test_items_are_kept_and_forgotten_as_ever(memory: KVCacheMemory) -> None:
    first, second, third = filled(memory)
    assert [item.memory for item in memory.get_by_ids([third, first])] == [
        f"<|im_start|>system\n{HEAD}\n\n{TEXTS[2]}\n\n",
        f"<|im_start|>system\n{HEAD}\n\n{TEXTS[0]}\n\n",
    ]
    assert memory.get(first).token_ids.tolist() == list(memory.engine.template.encode(TEXTS[0] + "\n\n"))
    memory.delete(second)
    assert {item.id for item in memory.get_all()} == {first, third}
    memory.delete_all()
    assert memory.get_all() == []
    item = memory.from_textual_memory(TextualMemoryItem(memory="A fact.", metadata={"source": "a.txt"}))
    assert item.metadata == {"source": "a.txt"}
    with pytest.raises(EmptyPromptError):
        memory.extract(" ")


def test_a_merge_is_the_prompt_of_all_items_in_order(engine: VLLMEngine, memory: KVCacheMemory) -> None:
    """MemOS returns the last one."""
    first, second, third = filled(memory)
    context = memory.merge([third, first, second], "When?")
    assert isinstance(context, ServedContext)
    assert context.prompt == f"<|im_start|>system\n{HEAD}\n\n{TEXTS[2]}\n\n{TEXTS[0]}\n\n{TEXTS[1]}\n\n"
    assert context.token_ids.tolist() == byte_tokenizer()(context.prompt)["input_ids"]
    assert context.report.strategy == "exact"
    assert context.report.reused_tokens + context.report.encoded_tokens == context.report.context_tokens
    sent = byte_tokenizer()(memory.get(third).memory)["input_ids"]  # it was sent behind the instruction
    assert context.report.reused_tokens == len(sent)
    asked = memory.get_cache([third, first, second])
    assert isinstance(asked, ContextPrompt)
    assert asked == context.prompt


def test_answers_over_a_merge_are_those_of_an_exact_merge_in_this_process(memory: KVCacheMemory) -> None:
    here = HFEngine(tiny_model(), byte_tokenizer())
    own = KVCacheMemory(here, instruction=HEAD)
    ours = own.merge(filled(own), "When was it completed?", "exact")
    theirs = memory.merge(filled(memory), "When was it completed?")
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert ours.tail_ids.tolist() == theirs.tail_ids.tolist()
    answers = [
        engine.generate(None, context, max_new_tokens=12) for engine, context in ((here, ours), (memory.engine, theirs))
    ]
    assert answers[0] == answers[1]
    with pytest.raises(FingerprintMismatchError):
        here.generate(None, theirs)
    with pytest.raises(UnsupportedModelError):
        memory.engine.generate(None, ours)


def test_canonical_order_makes_one_prompt_of_any_order(memory: KVCacheMemory) -> None:
    ids = filled(memory)
    prompts = {memory.merge(order, "When?", canonical=True).prompt for order in (ids, ids[::-1])}
    assert len(prompts) == 1
    [prompt] = prompts
    assert [prompt.count(text) for text in TEXTS] == [1, 1, 1]


def test_what_cannot_be_merged_is_refused(memory: KVCacheMemory, tiny_engine: HFEngine) -> None:
    ids = filled(memory)
    with pytest.raises(UnknownItemError):
        memory.merge([*ids, "nope"], "?")
    with pytest.raises(ContextLengthError):
        memory.merge(ids, "x" * 2000)
    with pytest.raises(InvalidInputError, match="VLLMKVCacheItem"):
        memory.add(KVCacheMemory(tiny_engine).extract("text"))
    with pytest.raises(InvalidInputError, match="KVCacheItem"):
        KVCacheMemory(tiny_engine).add(memory.get(ids[0]))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_dump_moves_the_prompts(engine: VLLMEngine, tmp_path: Path, kind: str) -> None:
    store = DiskStore(tmp_path / "store") if kind == "disk" else None
    memory = KVCacheMemory(engine, store, instruction=HEAD)
    ids = filled(memory)
    memory.dump(tmp_path / "dump")
    other = KVCacheMemory(engine, instruction=HEAD)
    other.load(tmp_path / "dump")
    assert other.merge(ids, "When?").prompt == memory.merge(ids, "When?").prompt
    assert [item.metadata for item in other.get_by_ids(ids)] == [item.metadata for item in memory.get_by_ids(ids)]


def test_another_models_prompts_are_not_loaded(server: WireServer, memory: KVCacheMemory, tmp_path: Path) -> None:
    filled(memory)
    memory.dump(tmp_path)
    with (
        VLLMEngine(server.url, tokenizer=byte_tokenizer(CHATML + "!")) as other,
        pytest.raises(FingerprintMismatchError, match="template"),
    ):
        KVCacheMemory(other).load(tmp_path)


def test_documents_kept_ahead_are_hit_by_the_question_that_begins_with_them(
    server: WireServer, memory: KVCacheMemory
) -> None:
    asked = [{"role": "system", "content": ["Read.\n", Document(TEXTS[0])]}, {"role": "user", "content": "When?"}]
    keys = memory.keep(asked, [{"source": "a"}])
    assert [memory.get(key).metadata["source"] for key in keys] == ["a"]
    *_, last = memory.stream(asked, sampling=memory.engine.sampling(max_new_tokens=1))
    context = memory.engine.template.prompt(asked).context_ids
    assert last.usage.cached_tokens >= len(context) // 16 * 16
    assert last.usage.context.mode == "prefix"
    sent = len(server.prompts())
    assert memory.keep(asked) == keys
    assert len(server.prompts()) == sent  # the server has it


def test_what_was_kept_by_another_process_is_sent_again(server: WireServer, tmp_path: Path) -> None:
    asked = [{"role": "system", "content": [Document(TEXTS[0])]}, {"role": "user", "content": "When?"}]
    for _ in range(2):
        with VLLMEngine(server.url) as engine:
            KVCacheMemory(engine, DiskStore(tmp_path)).keep(asked)
    assert len(server.prompts()) == 2


def test_a_corpus_is_synced_and_purged(server: WireServer, memory: KVCacheMemory) -> None:
    report = memory.sync(TEXTS)
    assert (report.encoded, report.kept, report.dropped) == (3, 0, 0)
    report = memory.sync(TEXTS[1:])
    assert (report.encoded, report.kept, report.dropped) == (0, 2, 1)
    assert memory.purge(TEXTS[1]).ids == report.ids[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert memory.engine.known_prefix(server.prompts()[0]) == 0  # it is not sent again


def test_a_memory_sends_the_salt_of_its_namespace(server: WireServer, engine: VLLMEngine) -> None:
    asked = [{"role": "system", "content": [Document(TEXTS[0])]}, {"role": "user", "content": "When?"}]
    for namespace in ("a", "b"):
        memory = KVCacheMemory(engine, namespace=namespace)
        memory.keep(asked)
    salts = [body["cache_salt"] for path, body in server.bodies if path == "/v1/completions"]
    assert len(set(salts)) == len(salts) == 2
    *_, last = KVCacheMemory(engine, namespace="c").stream(asked, sampling=engine.sampling(max_new_tokens=1))
    assert last.usage.cached_tokens == 0
