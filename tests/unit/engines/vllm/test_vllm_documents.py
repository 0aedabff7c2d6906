"""Documents on a server with the connector: what is asked, encoded and sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
from pydantic import BaseModel

from kvcag import Document, KVCacheMemory, VLLMEngine
from kvcag.chat_template import ChatTemplate, Prompt
from kvcag.core import content_key
from kvcag.engines.hf import HFEngine
from kvcag.engines.vllm.blocks import space_of
from kvcag.engines.vllm.documents import ServedDocuments
from kvcag.errors import UnsupportedModelError
from kvcag.testing import byte_tokenizer, tiny_model
from tests.wire_server import WireServer

MODEL = "m"
TEMPLATE = ChatTemplate(byte_tokenizer())


class Connector:
    """Answers as a server with the connector does."""

    def __init__(self, *, connected: bool = True) -> None:
        self.connected, self.learned = connected, set[str]()
        self.kept: set[tuple[str, str]] = set()
        self.asked: list[dict[str, Any]] = []

    def counts_transfers(self) -> bool:
        return True

    def json(self, kind: type[BaseModel], path: str, body: Mapping[str, Any]) -> BaseModel:
        asked, space = body["kv_transfer_params"]["kvcag"], body["salt"]
        self.asked.append(asked)
        if asked.get("forget"):
            self.kept = {each for each in self.kept if each[0] != space}
        for start, stop in asked.get("keep", ()):
            self.kept.add((space, content_key(MODEL, body["prompt"][start:stop])))
        if asked.get("learn"):
            passages = [body["prompt"][start:stop] for start, stop in asked["learn"]]
            assert all((space, content_key(MODEL, ids)) in self.kept for ids in passages)
            self.learned.add(space)
        missing = [key for key in asked.get("has", ()) if (space, key) not in self.kept]
        said = {"model": MODEL, "learned": space in self.learned, "missing": missing, "mode": "encoded"}
        return kind.model_validate({"kv_transfer_params": {"kvcag": said} if self.connected else None})

    def documents(self) -> ServedDocuments:
        made = ServedDocuments(self, lambda ids, name: {"prompt": list(ids), "salt": name}, lambda name: name)  # type: ignore[arg-type]
        assert made.is_available == self.connected
        self.asked.clear()
        return made


def prompt_of(*texts: str, question: str = "?") -> Prompt:
    documents = [Document(f"{text}\n\n") for text in texts]
    messages = [{"role": "system", "content": ["Read.\n\n", *documents]}, {"role": "user", "content": question}]
    return TEMPLATE.prompt(messages, seams="documents")


def test_a_server_without_the_connector_is_asked_once() -> None:
    server = Connector(connected=False)
    documents = server.documents()
    assert not documents.is_available
    assert server.asked == []


def test_what_the_server_lacks_is_encoded_behind_the_instruction_and_then_known() -> None:
    server, prompt = Connector(), prompt_of("one", "two", "three")
    documents = server.documents()
    served, encoded = documents.merging(prompt, "a")
    assert encoded == sum(map(len, prompt.document_ids))
    assert [list(asked) for asked in server.asked] == [["has"], ["keep"], ["keep"], ["keep"]]
    assert server.kept == {("a", content_key(MODEL, ids)) for ids in (prompt.head_ids, *prompt.kept_ids)}
    spans = served.params["kvcag"]["merge"]
    assert spans[0] == [0, len(prompt.head_ids)]
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert [tuple(prompt.token_ids[start:stop]) for start, stop in spans[1:]] == list(prompt.document_ids)
    assert space_of(served.salt) == ("a", True)
    server.asked.clear()
    again, encoded = documents.merging(prompt_of("three", "one", question="What?"), "a")
    assert encoded == 0
    assert server.asked == []
    assert again.salt != served.salt


def test_documents_that_another_process_encoded_are_not_encoded_again() -> None:
    server, prompt = Connector(), prompt_of("one", "two")
    server.documents().merging(prompt, "a")
    elsewhere = server.documents()
    assert elsewhere.merging(prompt, "a")[1] == 0
    assert [list(asked) for asked in server.asked] == [["has"]]
    assert elsewhere.merging(prompt, "b")[1] > 0


def test_documents_that_the_server_lost_are_asked_for_again() -> None:
    server, prompt = Connector(), prompt_of("one", "two")
    documents = server.documents()
    documents.merging(prompt, "a")
    server.kept.clear()
    documents.missed(prompt, "a")
    assert documents.merging(prompt, "a")[1] == sum(map(len, prompt.document_ids))


def test_a_namespace_that_is_forgotten_is_deleted_on_the_server() -> None:
    server, prompt = Connector(), prompt_of("one")
    documents = server.documents()
    for namespace in ("a", "b"):
        documents.merging(prompt, namespace)
    documents.erase("a")
    assert {space for space, _ in server.kept} == {"b"}
    assert not documents.holds((*prompt.head_ids, *prompt.kept_ids[0]), "a")
    assert documents.holds((*prompt.head_ids, *prompt.kept_ids[0]), "b")


def test_drift_is_learned_once_a_namespace() -> None:
    server = Connector()
    documents = server.documents()
    assert not documents.has_learned("a")
    assert documents.learn((1, 2), [(3, 4), (5,), (6, 7)], "a")
    assert server.asked[-2]["learn"] == [[2, 4], [4, 5], [5, 7]]
    server.asked.clear()
    assert documents.has_learned("a")
    assert server.asked == []
    assert not documents.has_learned("b")


def test_documents_behind_a_text_between_two_are_read_in_place() -> None:
    messages = [
        {"role": "user", "content": [Document("one\n\n"), "What?"]},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": [Document("two\n\n"), "And now?"]},
    ]
    prompt = TEMPLATE.prompt(messages, seams="documents")
    assert len(prompt.document_ids) == 2
    served, _ = Connector().documents().merging(prompt, "")
    assert served.params["kvcag"]["merge"][-1][1] == prompt.document_places[0].stop


# --- the engine --------------------------------------------------------------------------------------------------


@pytest.fixture
def wire_server() -> Iterator[WireServer]:
    with WireServer(HFEngine(tiny_model(), byte_tokenizer())) as running:
        yield running


@pytest.fixture
def engine(wire_server: WireServer) -> VLLMEngine:
    made = VLLMEngine(wire_server.url, tokenizer=byte_tokenizer())
    made._documents = Connector().documents()
    return made


def test_strategies_that_recompute_are_refused_with_the_reason(engine: VLLMEngine) -> None:
    assert engine.serves_merged("auto")
    assert engine.serves_merged("rotate")
    assert not engine.serves_merged("exact")
    memory = KVCacheMemory(engine)
    for strategy in ("query", "anchor", "deviation", "full"):
        with pytest.raises(UnsupportedModelError, match="'rotate', 'exact' or 'auto'"):
            memory.stream([{"role": "user", "content": [Document("one\n\n"), "?"]}], strategy=strategy)


def test_without_the_connector_nothing_changes(wire_server: WireServer) -> None:
    with VLLMEngine(wire_server.url, tokenizer=byte_tokenizer()) as engine:
        assert not engine.serves_merged("rotate")
        assert not engine.serves_merged("query")
    with VLLMEngine(wire_server.url, tokenizer=byte_tokenizer(), merge_documents=False) as engine:
        engine._documents = Connector().documents()
        assert not engine.serves_merged("rotate")


def test_a_merged_prompt_has_its_salt_and_its_spans(engine: VLLMEngine, wire_server: WireServer) -> None:
    messages = [{"role": "user", "content": [Document("one\n\n"), Document("two\n\n"), "?"]}]
    *_, last = KVCacheMemory(engine, namespace="a").stream(messages, strategy="rotate", max_new_tokens=2)
    [body] = [body for path, body in wire_server.bodies if "kv_transfer_params" in body]
    assert body["cache_salt"].startswith("kvcag-merged.")
    assert len(body["kv_transfer_params"]["kvcag"]["merge"]) >= 2
    assert last.usage.context.encoded_tokens == last.usage.context.context_tokens  # all were new
    assert last.usage.cached_tokens + last.usage.created_tokens <= last.usage.prompt_tokens
