"""Weights as people have them: on several devices, offloaded, quantised, with adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import _CONTINUES, layers_of
from kvcag.cache.merge import merge
from kvcag.testing import byte_tokenizer, tiny_model
from tests.merging import encode, error, ids, parts_of, tokens_of

TEXTS = ["The library opens at nine. " * 4, "It is in Harbour Street. " * 4]


def engine_of(model: Any, **settings: Any) -> HFEngine:
    return HFEngine(model, byte_tokenizer(), **settings)


def answers(model: Any, **settings: Any) -> list[str]:
    """What a memory over a model says by each strategy, and a second question over the same documents."""
    memory = KVCacheMemory(engine_of(model), **settings)
    memory.add(TEXTS)
    said = [memory.ask("When?", strategy=how, max_new_tokens=6) for how in ("rotate", "query", "exact")]
    assert [answer.report.mode for answer in said if answer.report][:2] == ["merged", "merged"]
    return [answer.text for answer in said]


@pytest.fixture
def whole() -> PreTrainedModel:
    return tiny_model()


# --- several devices ------------------------------------------------------------------------------------------------

PLACES = {
    "last layers on disk": {"": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"},
    "first weights on disk": {"": "cpu", "model.embed_tokens": "disk", "model.layers.0": "disk"},
    "all on disk": {"": "disk"},
    "all in memory": {"": "memory"},
}
if not _CONTINUES:  # transformers before 5.24 counts no token in a cache whose first layer is on disk
    del PLACES["all on disk"]


@pytest.fixture(params=PLACES)
def offloaded(request: pytest.FixtureRequest, whole: PreTrainedModel, tmp_path: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    if request.param == "all in memory":
        return accelerate.cpu_offload(copy.deepcopy(whole), execution_device=torch.device("cpu"))
    names = {name.rpartition(".")[0] for name, _ in whole.named_parameters()}
    places = PLACES[request.param]
    device_map = {
        name: places[max((at for at in places if not at or name == at or name.startswith(f"{at}.")), key=len)]
        for name in sorted(names)
    }
    return accelerate.dispatch_model(copy.deepcopy(whole), device_map, offload_dir=tmp_path, force_hooks=True)


def test_an_offloaded_model_answers_as_the_whole_one(whole: PreTrainedModel, offloaded: Any) -> None:
    assert engine_of(offloaded).device == torch.device("cpu")
    assert answers(offloaded) == answers(whole)


def test_an_offloaded_models_full_merge_is_a_full_prefill(whole: PreTrainedModel, offloaded: Any) -> None:
    parts = parts_of(whole, ids(7), [ids(33, seed=1), ids(20, seed=2)])
    merged = merge(offloaded, parts, ids(9, seed=9), strategy="full")
    assert error(merged.layers, encode(whole, tokens_of(parts))) < 1e-5


def test_an_offloaded_model_has_the_fingerprint_of_the_whole_one(whole: PreTrainedModel, offloaded: Any) -> None:
    assert engine_of(offloaded).fingerprint.matches(engine_of(whole).fingerprint)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_gpus_answer_as_on_one(whole: PreTrainedModel) -> None:
    accelerate = pytest.importorskip("accelerate")
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    device_map |= {"model.layers.1": 1, "model.layers.2": 1, "model.norm": 1, "lm_head": 1}
    split = accelerate.dispatch_model(copy.deepcopy(whole), device_map)
    assert answers(split) == answers(whole)


# --- adapters -------------------------------------------------------------------------------------------------------


PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora(peft: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@PEFT
def test_merging_an_adapter_in_one_line_is_another_model(whole: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    engine = engine_of(whole)
    bare = engine.fingerprint
    peft.get_peft_model(whole, lora(peft)).merge_and_unload()
    assert not engine.fingerprint.matches(bare)


@PEFT
def test_a_wrapped_model_and_its_own_are_one(whole: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    bare = engine_of(whole).fingerprint
    wrapped = peft.get_peft_model(whole, lora(peft))
    assert engine_of(wrapped).fingerprint.matches(engine_of(whole).fingerprint)
    assert not engine_of(wrapped).fingerprint.matches(bare)
    assert answers(wrapped) == answers(whole)


# --- quantised ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantised_weights_merge_and_have_a_fingerprint_of_their_own(kind: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    dtype = torch.bfloat16 if kind == "int4" else torch.float32
    settings: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "dtype": dtype}
    models = [tiny_model(seed=seed, **settings) for seed in (0, 0, 1)]
    plain = engine_of(tiny_model(**settings)).fingerprint
    config = {
        "int8": quantization.Int8WeightOnlyConfig(),
        "int4": quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32)),
        "fp8": quantization.Float8WeightOnlyConfig(),
    }[kind]
    for model in models:
        quantization.quantize_(model, config)
    first, same, other = (engine_of(model).fingerprint for model in models)
    assert [first.matches(print) for print in (same, other, plain)] == [True, False, False]
    assert len(answers(models[0])) == 3
    parts = parts_of(models[0], ids(7), [ids(33, seed=1), ids(20, seed=2)])
    merged = merge(models[0], parts, ids(9, seed=9), strategy="full")
    assert error(merged.layers, encode(models[0], tokens_of(parts))) < (0.05 if kind == "int4" else 1e-5)
    assert {t.dtype for kv in layers_of(engine_of(models[0]).build_kv_cache("a")) for t in kv} == {dtype}


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_bitsandbytes_merge_and_their_scales_are_part_of_the_fingerprint(
    bits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """8-bit ones lie elsewhere after the first pass than before it."""
    pytest.importorskip("bitsandbytes")
    caplog.set_level("ERROR")
    models = []
    for times in (1, 1, 2):
        made = tiny_model(hidden_size=128, intermediate_size=128, head_dim=32)
        made.model.layers[0].mlp.up_proj.weight.data.mul_(times)
        made.save_pretrained(tmp_path / str(times))
        config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / str(times), quantization_config=config))
    plain = engine_of(made).fingerprint
    first, same, other = (engine_of(model).fingerprint for model in models)
    assert [first.matches(print) for print in (same, other, plain)] == [True, False, False]
    assert len(answers(models[0])) == 3
    assert engine_of(models[0]).fingerprint.matches(first)
    parts = parts_of(models[0], ids(7), [ids(33, seed=1), ids(20, seed=2)])
    merged = merge(models[0], parts, ids(9, seed=9), strategy="full")
    assert error(merged.layers, encode(models[0], tokens_of(parts))) < (0.02 if bits == 8 else 1e-5)
    assert {t.dtype for kv in layers_of(engine_of(models[0]).build_kv_cache("a")) for t in kv} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("bits", [8, 4])
def test_on_a_gpu_weights_of_bitsandbytes_are_reused_and_merged(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model(hidden_size=128, intermediate_size=128, head_dim=32).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    settings: dict[str, Any] = {"quantization_config": config, "device_map": "cuda", "dtype": torch.bfloat16}
    first, same = (AutoModelForCausalLM.from_pretrained(tmp_path, **settings) for _ in range(2))
    made_by = engine_of(first).fingerprint
    assert len(answers(first)) == 3
    assert [engine_of(model).fingerprint.matches(made_by) for model in (first, same)] == [True, True]
    memory = KVCacheMemory(engine_of(first))
    memory.add(TEXTS)
    memory.ask("When?", strategy="exact", max_new_tokens=6)
    again = memory.ask("When?", strategy="exact", max_new_tokens=6).report
    assert again is not None
    assert again.reused_tokens == again.context_tokens


def test_packed_weights_that_are_buffers_are_part_of_the_fingerprint(whole: PreTrainedModel) -> None:
    """GPTQ and AWQ keep theirs so."""
    prints = []
    for value in (1, 2):
        projection = whole.model.layers[0].mlp.up_proj
        projection.register_buffer("qweight", torch.full((4, 4), value, dtype=torch.int32))
        prints.append(engine_of(whole).fingerprint)
    assert not prints[0].matches(prints[1])
