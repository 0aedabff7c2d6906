from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kvcag import HFEngine, KVCacheMemory, KVCacheMemoryConfig, Sampling
from kvcag.testing import byte_tokenizer, tiny_model
from tests.wire_server import WireServer


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def config(model_dir: Path, backend: str = "huggingface", **settings: Any) -> dict[str, Any]:
    return {
        "extractor_llm": {"backend": backend, "config": {"model_name_or_path": str(model_dir), **settings}},
        "memory_filename": "kv.json",
    }


def test_a_memos_configuration_reads_the_same(model_dir: Path, tmp_path: Path) -> None:
    memory = KVCacheMemory.from_config(config(model_dir, temperature=0.8, max_tokens=7, do_sample=True, top_k=5))
    assert memory.engine.sampling() == Sampling(max_new_tokens=7, temperature=0.8, top_k=5, top_p=0.95)
    item = memory.extract("text")
    memory.add([item])
    memory.dump(tmp_path / "out")
    assert (tmp_path / "out" / "kv.json").is_file()


def test_greedy_is_the_default(model_dir: Path) -> None:
    memory = KVCacheMemory.from_config(KVCacheMemoryConfig.model_validate(config(model_dir, remove_think_prefix=True)))
    assert memory.engine.sampling().greedy
    assert memory.engine.sampling().strip_thinking


def test_a_singleton_is_shared_among_equal_configurations(model_dir: Path) -> None:
    one, same = (KVCacheMemory.from_config(config(model_dir, "huggingface_singleton")) for _ in range(2))
    other = KVCacheMemory.from_config(config(model_dir, "huggingface_singleton", max_tokens=9))
    alone = KVCacheMemory.from_config(config(model_dir))
    assert one.engine is same.engine
    assert len({id(m.engine) for m in (one, other, alone)}) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"backend": "ollama"},
        {"add_generation_prompt": False},
        {"max_tokens": 0},
        {"temprature": 1},
    ],
)
def test_a_wrong_configuration_is_refused(model_dir: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        KVCacheMemory.from_config(config(model_dir, **wrong))


def test_a_filename_is_not_a_path(model_dir: Path) -> None:
    with pytest.raises(ValidationError, match="memory_filename"):
        KVCacheMemory.from_config({**config(model_dir), "memory_filename": "../kv.json"})


def test_a_memos_configuration_of_a_server_reads_the_same(model_dir: Path) -> None:
    settings = {"model_name_or_path": "tiny", "temperature": 0.5, "max_tokens": 7, "enable_thinking": False}
    with WireServer(HFEngine(tiny_model(), byte_tokenizer())) as server:
        extractor = {"backend": "vllm", "config": {**settings, "api_base": server.url}}
        memory = KVCacheMemory.from_config({"extractor_llm": extractor, "instruction": "Read."})
        assert memory.engine.sampling() == Sampling(max_new_tokens=7, temperature=0.5, top_k=20, top_p=0.95)
        assert memory.engine.template.variables == {"enable_thinking": False}
        item = memory.extract("text")
        assert item.memory == "<|im_start|>system\nRead.\n\ntext\n\n"
        memory.engine.close()
    with pytest.raises(ValidationError, match="api_base"):
        KVCacheMemory.from_config(config(model_dir, api_base="http://127.0.0.1"))
