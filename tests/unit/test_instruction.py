"""The instruction is stored as documents are: a restarted process does not read it again."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
from langchain_core.documents import Document as LangChainDocument
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core import PromptTemplate
from llama_index.core.schema import NodeWithScore, TextNode

from kvcag import Document, HFEngine, KVCacheMemory
from kvcag.cache.layers import _CONTINUES
from kvcag.errors import CacheWarning
from kvcag.langchain import ChatKVCAG, create_cag_documents_chain
from kvcag.llama_index import CAGSynthesizer, KVCacheLLM
from kvcag.stores import DiskStore, FsspecStore, MemoryStore, TieredStore, verify
from kvcag.stores.files import is_instruction
from kvcag.testing import byte_tokenizer, tiny_model
from tests.forwards import forward_lengths
from tests.stored import documents_in

INSTRUCTION = " ".join(["Answer as the library's reading room would, and say so where its papers are silent."] * 4)
TEXTS = ["The library opens at nine.\n\n", "It stands in Harbour Street.\n\n"]


def fresh() -> HFEngine:
    """A process that was just started."""
    return HFEngine(tiny_model(), byte_tokenizer())


def instructions(store: DiskStore) -> list[str]:
    return [key for key in iter(store.keys()) if is_instruction(key)]


def ask_memory(engine: HFEngine, store: Path, texts: list[str] = TEXTS) -> None:
    system = {"role": "system", "content": [f"{INSTRUCTION}\n\n", *map(Document, texts)]}
    KVCacheMemory(engine, store).ask(
        [system, {"role": "user", "content": "When?"}], strategy="rotate", max_new_tokens=1
    )


def ask_langchain(engine: HFEngine, store: Path, texts: list[str] = TEXTS) -> None:
    llm = ChatKVCAG(engine=engine, store=store, max_tokens=1, merge_strategy="rotate")
    prompt = ChatPromptTemplate.from_messages([("system", f"{INSTRUCTION}\n\n{{context}}"), ("human", "{input}")])
    documents = [LangChainDocument(page_content=text) for text in texts]
    create_cag_documents_chain(llm, prompt).invoke({"context": documents, "input": "When?"})


def ask_llama_index(engine: HFEngine, store: Path, texts: list[str] = TEXTS) -> None:
    llm = KVCacheLLM(engine=engine, store=store, max_new_tokens=1, merge_strategy="rotate", system_prompt=INSTRUCTION)
    CAGSynthesizer(llm).synthesize("When?", [NodeWithScore(node=TextNode(text=text)) for text in texts])


ASK = pytest.mark.parametrize("ask", [ask_memory, ask_langchain, ask_llama_index])


@ASK
def test_a_restarted_process_does_not_read_the_instruction_again(ask, tmp_path: Path) -> None:
    ask(fresh(), tmp_path)
    kept = sum(DiskStore(tmp_path).manifest(key).tokens for key in instructions(DiskStore(tmp_path)))
    assert kept > len(INSTRUCTION)
    counts = []
    for forget in (False, True):
        if forget:
            DiskStore(tmp_path).erase(instructions(DiskStore(tmp_path)))
        engine = fresh()
        with forward_lengths(engine.model) as lengths:
            ask(engine, tmp_path)
        counts.append(sum(lengths))
    assert counts[1] - counts[0] == kept


@ASK
def test_a_new_document_is_encoded_behind_the_stored_instruction(ask, tmp_path: Path) -> None:
    ask(fresh(), tmp_path)
    engine = fresh()
    with forward_lengths(engine.model) as lengths:
        ask(engine, tmp_path, ["It lends maps, too.\n\n", *TEXTS])
    kept = sum(DiskStore(tmp_path).manifest(key).tokens for key in instructions(DiskStore(tmp_path)))
    assert max(lengths) < kept


def test_the_answer_is_that_of_a_process_that_read_it(tmp_path: Path) -> None:
    def answer(store: Path) -> tuple[str, int, int]:
        memory = KVCacheMemory(fresh(), store, INSTRUCTION)
        memory.add(TEXTS)
        said = memory.ask("When does it open?", strategy="rotate", max_new_tokens=8)
        return said.text, said.usage.prompt_tokens, said.usage.created_tokens

    first, again = answer(tmp_path), answer(tmp_path)
    assert first[:2] == again[:2]


def test_a_short_one_is_not_stored(tmp_path: Path) -> None:
    short = "Answer from the papers."
    documents = [LangChainDocument(page_content=text) for text in TEXTS]
    memory = KVCacheMemory(fresh(), tmp_path, short)
    memory.add(TEXTS)
    memory.ask("When?", max_new_tokens=1)
    prompt = ChatPromptTemplate.from_messages([("system", f"{short}\n\n{{context}}"), ("human", "{input}")])
    llm = ChatKVCAG(engine=memory.engine, store=tmp_path, max_tokens=1)
    create_cag_documents_chain(llm, prompt).invoke({"context": documents, "input": "When?"})
    ours = KVCacheLLM(engine=memory.engine, store=tmp_path, max_new_tokens=1, system_prompt=short)
    template = PromptTemplate("{context_str}\n\n{query_str}")
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    CAGSynthesizer(ours, text_qa_template=template).synthesize("When?", nodes)
    assert len(documents_in(memory.store)) >= 2
    assert instructions(memory.store) == []


def test_it_is_no_document_of_the_user(tmp_path: Path) -> None:
    memory = KVCacheMemory(fresh(), tmp_path, INSTRUCTION)
    memory.add(TEXTS)
    assert len(instructions(memory.store)) == 1
    assert len(memory) == len(memory.get_all()) == len(list(memory)) == 2
    assert memory.store.stats().items == 2
    head = len(memory.engine.template.instruction_ids(INSTRUCTION))
    assert memory.ask("When?", max_new_tokens=1).report.context_tokens == head + sum(map(len, TEXTS))
    assert memory.sync([TEXTS[0]]).dropped == 0
    assert len(instructions(memory.store)) == 1


STORES = {
    "memory": lambda path: MemoryStore(),
    "disk": DiskStore,
    "remote": lambda path: FsspecStore(f"memory://{path}"),
    "tiered": lambda path: TieredStore([MemoryStore(), DiskStore(path)]),
}


@pytest.mark.parametrize("opened", STORES.values(), ids=STORES)
def test_every_store_holds_it_beside_its_documents(opened, tmp_path: Path) -> None:
    store = opened(tmp_path)
    KVCacheMemory(fresh(), store, INSTRUCTION).add(TEXTS)
    documents = sum(store.get(key).token_ids.numel() for key in documents_in(store))
    assert documents == sum(map(len, TEXTS))
    [key] = instructions(store)
    assert store.stats().items == 2
    assert store.contains(key)
    assert store.manifest(key).tokens > len(INSTRUCTION)
    memory = KVCacheMemory(fresh(), store, INSTRUCTION)
    with forward_lengths(memory.engine.model) as lengths:
        memory.add(["It lends maps."])
    assert lengths == [len("It lends maps.\n\n")]
    assert len(memory.delete_all().ids) == 4
    assert list(store.keys()) == []


def test_a_disk_store_with_it_verifies_and_counts_its_bytes(tmp_path: Path) -> None:
    KVCacheMemory(fresh(), tmp_path, INSTRUCTION).add(TEXTS)
    store = DiskStore(tmp_path)
    report = verify(tmp_path)
    assert (report.clean, report.sound) == (True, 3)
    assert store.stats().bytes == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))


def test_a_budget_evicts_it_as_it_does_documents(tmp_path: Path) -> None:
    small = DiskStore(tmp_path, 60_000)
    memory = KVCacheMemory(fresh(), small, INSTRUCTION)
    with pytest.warns(CacheWarning, match="an instruction was encoded but not stored"):
        memory.add(["It has a cat."])
    assert memory.ask("When?", max_new_tokens=1).text is not None
    assert instructions(small) == []


def test_a_store_that_quantises_has_it_read_again(tmp_path: Path) -> None:
    def encoded() -> int:
        memory = KVCacheMemory(fresh(), DiskStore(tmp_path, quantize="int8"), INSTRUCTION)
        with forward_lengths(memory.engine.model) as lengths:
            memory.add([f"It has {len(memory)} cats."])
        return sum(lengths)

    assert encoded() == encoded() > len(INSTRUCTION)


@pytest.mark.parametrize("name", ["disk", "remote", "tiered"])
def test_a_store_that_quantises_has_no_instruction(name: str, tmp_path: Path) -> None:
    """It is read again there, so its file would be of no use."""
    opened = {
        "disk": lambda: DiskStore(tmp_path, quantize="int8"),
        "remote": lambda: FsspecStore(f"memory://{tmp_path}", quantize="int8"),
        "tiered": lambda: TieredStore([MemoryStore(), DiskStore(tmp_path, quantize="int8")]),
    }
    store = opened[name]()
    assert not store.is_exact
    KVCacheMemory(fresh(), store, INSTRUCTION).add(TEXTS)
    assert instructions(store) == []
    assert store.stats().items == 2


@pytest.mark.skipif(not _CONTINUES, reason="recurrent layers need transformers 5.24")
def test_recurrent_layers_go_on_from_their_stored_states(tmp_path: Path) -> None:
    def answer(store: Path) -> tuple[str, int]:
        memory = KVCacheMemory(
            HFEngine(tiny_model(model_type="lfm2", layer_types=["conv", "conv", "full_attention"]), byte_tokenizer()),
            store,
            INSTRUCTION,
        )
        with forward_lengths(memory.engine.model) as lengths:
            memory.add(TEXTS)
        return memory.ask("When?", strategy="rotate", max_new_tokens=6).text, sum(lengths)

    (first, read), (again, read_again) = answer(tmp_path), answer(tmp_path)
    assert first == again
    assert read > len(INSTRUCTION)
    assert read_again == 0


def test_a_question_over_a_known_instruction_asks_the_store_for_nothing(tmp_path: Path) -> None:
    memory = KVCacheMemory(fresh(), tmp_path, INSTRUCTION)
    ids = memory.add(TEXTS)
    memory.merge(ids, "When?", "exact")
    with (
        patch.object(DiskStore, "contains", side_effect=AssertionError),
        memory.documents.instruction(memory.engine.template.instruction_ids(INSTRUCTION)),
    ):
        pass


def test_many_engines_and_threads_leave_one_whole_item(tmp_path: Path) -> None:
    memories = [KVCacheMemory(fresh(), tmp_path, INSTRUCTION) for _ in range(3)]
    with ThreadPoolExecutor(9) as pool:
        ids = list(pool.map(lambda at: memories[at % 3].add(TEXTS), range(9)))
    assert len(set(map(tuple, ids))) == 1
    assert len(instructions(memories[0].store)) == 1
    assert verify(tmp_path).clean


def test_one_that_is_deleted_while_it_is_made_does_not_come_back(tmp_path: Path) -> None:
    memory = KVCacheMemory(fresh(), tmp_path, INSTRUCTION)
    ids = memory.engine.template.instruction_ids(INSTRUCTION)
    put = DiskStore.put

    def put_late(store: DiskStore, item) -> None:
        memory.delete_all()
        put(store, item)

    with patch.object(DiskStore, "put", put_late), memory.documents.instruction(ids):
        pass
    assert list(memory.store.keys()) == []


def test_purging_its_text_or_deleting_everything_reaches_it(tmp_path: Path) -> None:
    memory = KVCacheMemory(fresh(), tmp_path, INSTRUCTION)
    memory.add(TEXTS)
    kept = instructions(memory.store)
    assert memory.purge(INSTRUCTION).ids == kept
    assert instructions(memory.store) == []
    assert len(memory) == 2
    memory.add(["It has a cat."])
    assert instructions(memory.store) == kept
    memory.delete_all()
    assert list(memory.store.keys()) == []


def test_what_users_say_before_documents_is_not_kept(tmp_path: Path) -> None:
    memory = KVCacheMemory(fresh(), tmp_path)
    secret = "My name is Ottilie and my passport has the number C01X00T47, which nobody may keep."
    said = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": secret},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": [f"{secret}\n\n", *map(Document, TEXTS)]},
    ]
    memory.ask(said, max_new_tokens=1, strategy="rotate")
    [key] = instructions(memory.store)
    text = memory.store.manifest(key).records.composed_text_memory
    assert INSTRUCTION in text
    assert "My name" not in text


def test_namespaces_share_no_instruction(tmp_path: Path) -> None:
    for namespace in ("a", "b"):
        KVCacheMemory(fresh(), tmp_path, INSTRUCTION, namespace=namespace).add(TEXTS)
    engine = fresh()
    KVCacheMemory(engine, tmp_path, INSTRUCTION, namespace="a").delete_all()
    with forward_lengths(engine.model) as lengths:
        KVCacheMemory(engine, tmp_path, INSTRUCTION, namespace="a").add([TEXTS[0]])
    assert sum(lengths) > len(INSTRUCTION)
    assert len(instructions(DiskStore(tmp_path, namespace="b"))) == 1


def test_one_that_is_damaged_is_read_again_with_a_warning(tmp_path: Path) -> None:
    KVCacheMemory(fresh(), tmp_path, INSTRUCTION).add(TEXTS)
    store = DiskStore(tmp_path)
    file = store.file(instructions(store)[0])
    file.write_bytes(file.read_bytes()[:-40])
    assert [damaged for damaged, _ in verify(tmp_path).damaged] == [file]
    memory = KVCacheMemory(fresh(), tmp_path, INSTRUCTION)
    with pytest.warns(UserWarning, match="encoding an instruction again"):
        memory.add(["It lends maps."])
