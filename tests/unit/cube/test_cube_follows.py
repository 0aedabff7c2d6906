"""After any sequence of changes, a cube has caches of its own texts only."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcag import HFEngine, KVCacheMemory, MemoryCube
from kvcag.cache.layers import layers_of
from kvcag.chat_template import Prompt
from kvcag.core import MergeSettings, TextualMemoryItem
from kvcag.cube.dump import read_dump
from kvcag.memory import insert_documents
from kvcag.stores import DiskStore, MemoryStore, TieredStore
from kvcag.testing import byte_tokenizer, tiny_model

HEAD = "Notes:"
ENGINE = HFEngine(tiny_model(), byte_tokenizer())
PLAIN = HFEngine(tiny_model(), byte_tokenizer(), prefix_cache_bytes=0)

ids = st.sampled_from(["one", "two", "three"])
TEXTS = ["red", "green", "red green", "blue\n\nred", "yellow\n", "it"]
said = st.sampled_from(TEXTS)


def prompt_of(cube: MemoryCube, text: str) -> Prompt:
    """The prompt with one text."""
    template = cube.memory.engine.template
    return template.prompt(insert_documents(HEAD, [f"{text}\n\n"], [{"role": "user", "content": "?"}]))


class Follows(RuleBasedStateMachine):
    """A cube with three tiers, and a dict with the expected texts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.dumped: dict[str, str] | None = None
        self.expected: dict[str, str] = {}
        self.cube = self.fresh("first")
        torch.set_num_threads(1)

    def fresh(self, name: str) -> MemoryCube:
        tiers = [MemoryStore(), DiskStore(self.folder / name / "near"), DiskStore(self.folder / name / "far")]
        ENGINE.prefixes.clear()
        return MemoryCube(ENGINE, store=TieredStore(tiers), instruction=HEAD)

    @rule(id=ids, text=said)
    def add(self, id: str, text: str) -> None:
        self.cube.add(TextualMemoryItem(id=id, memory=text))
        self.expected[id] = text

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), text=said)
    def edit(self, data: st.DataObject, text: str) -> None:
        id = data.draw(st.sampled_from(sorted(self.expected)))
        self.cube.edit(id, text)
        self.expected[id] = text

    @rule(id=ids)
    def delete(self, id: str) -> None:
        self.cube.delete(id)
        self.expected.pop(id, None)

    @rule()
    def encode(self) -> None:
        self.cube.encode()

    @rule(strategy=st.sampled_from(["auto", "query", "exact", "rotate"]))
    def ask(self, strategy: str) -> None:
        answer = self.cube.ask("Which?", strategy=strategy, max_new_tokens=1)
        assert {text.id: text.memory for text in answer.sources} == self.expected

    @rule()
    def dump(self) -> None:
        self.cube.dump(self.folder / "dump")
        self.dumped = dict(self.expected)
        for item in read_dump(self.folder / "dump").items:
            assert self.only_of_texts(item.records.composed_text_memory) or item.base_position == 0

    @precondition(lambda self: self.dumped is not None)
    @rule()
    def load(self) -> None:
        self.cube.load(self.folder / "dump")
        self.expected |= self.dumped or {}

    @precondition(lambda self: self.dumped is not None)
    @rule()
    def move(self) -> None:
        self.cube.memory.store.close()
        shutil.rmtree(self.folder / "first", ignore_errors=True)
        self.cube = self.fresh("first")
        self.cube.load(self.folder / "dump")
        self.expected = dict(self.dumped or {})

    @invariant()
    def it_says_what_it_should(self) -> None:
        assert {text.id: text.memory for text in self.cube.get_all()} == self.expected

    @invariant()
    def no_tier_holds_a_cache_of_anything_else(self) -> None:
        for tier in self.cube.memory.store.tiers:
            for key in tier.keys():  # noqa: SIM118 - a store is no dict
                manifest = tier.manifest(key)
                assert manifest is not None
                assert self.only_of_texts(manifest.records.composed_text_memory), manifest.records

    @invariant()
    def no_recent_context_holds_a_text_that_is_gone(self) -> None:
        for text in TEXTS:
            if not any(f"{live}\n\n".startswith(f"{text}\n\n") for live in self.expected.values()):
                context_ids = prompt_of(self.cube, text).context_ids
                assert ENGINE.prefixes.match(context_ids)[0] < len(context_ids)

    def only_of_texts(self, text: str) -> bool:
        """Whether a text is made of the expected ones, by taking them off its front one after another."""
        pending, seen = [text.strip("\n")], set()
        while pending:
            rest = pending.pop()
            if not rest:
                return True
            if rest not in seen:
                seen.add(rest)
                fronts = [one.strip("\n") for one in self.expected.values()]
                pending += [rest[len(f) :].strip("\n") for f in fronts if rest == f or rest.startswith(f"{f}\n")]
        return False

    def teardown(self) -> None:
        for text in self.cube.get_all():  # its context is what encoding it afresh gives
            prompt = prompt_of(self.cube, text.memory)
            context = self.cube.memory.context_for(prompt, MergeSettings("rotate"))
            fresh = KVCacheMemory(PLAIN, instruction=HEAD).context_for(prompt, MergeSettings("exact"))
            assert torch.equal(context.token_ids, fresh.token_ids)
            for kept, made in zip(layers_of(context.cache), layers_of(fresh.cache), strict=True):
                torch.testing.assert_close(kept, made, rtol=1e-5, atol=1e-5)
        self.cube.memory.store.close()
        shutil.rmtree(self.folder)


TestFollows = Follows.TestCase
TestFollows.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
