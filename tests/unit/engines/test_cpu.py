"""A step on a CPU computes what the model computes, or leaves it to the model."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.backends import mkldnn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvcag import HFEngine, Sampling
from kvcag.cache.layers import generation_cache
from kvcag.chat_template import Prompt
from kvcag.engines import cpu
from kvcag.engines.cpu import Step
from kvcag.engines.loading import quantize_weights
from kvcag.testing import byte_tokenizer, tiny_model
from tests.merging import ids

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
}
PROMPT = ids(90).tolist()


def model_of(kind: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 512, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # not ones and zeros, as they are made
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model  # type: ignore[no-any-return]


def engine_of(model: PreTrainedModel) -> HFEngine:
    return HFEngine(model, byte_tokenizer(), prefix_cache_bytes=0)


def steps(engine: HFEngine, count: int = 3) -> torch.Tensor:
    """Logits of some steps behind a prompt, `(count, vocabulary)`."""
    cache = generation_cache([engine.prefill(PROMPT)[0]], room=count)
    return torch.cat([engine.forward([token], cache) for token in ids(count).tolist()])


def wanted(model: PreTrainedModel, count: int = 3) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([[*PROMPT, *ids(count).tolist()]])).logits[0, -count:]
    return logits


def answer(engine: HFEngine) -> list[int]:
    chunks = engine.stream(Prompt(tuple(PROMPT), (), ()), Sampling(max_new_tokens=12))
    return [token for chunk in chunks for token in chunk.token_ids]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_computes_what_the_model_computes(kind: str) -> None:
    engine = engine_of(model_of(kind, **FAMILIES[kind]))
    torch.testing.assert_close(steps(engine), wanted(engine.model), atol=1e-5, rtol=1e-5)
    assert engine._step is not None
    assert engine._step.agrees


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_greedy_answer_is_the_same_token_for_token(kind: str) -> None:
    engine, alone = (engine_of(model_of(kind, **FAMILIES[kind])) for _ in range(2))
    alone.__dict__["_step"] = None
    assert answer(engine) == answer(alone)
    assert engine._step is not None
    assert engine._step.agrees


@pytest.mark.parametrize("int8", [False, True])
def test_a_step_in_bf16_is_as_near_to_fp32_as_the_models_own(int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_quick_without_onednn", lambda: True)
    model = model_of("llama").bfloat16()
    if int8:
        quantize_weights(model)
    right = wanted(model.float() if not int8 else model).float()
    engine = engine_of(model.bfloat16() if not int8 else model)
    got = steps(engine).float()
    engine.__dict__["_step"] = None
    own = steps(engine).float()
    assert (got - right).norm() <= 1.3 * (own - right).norm() + 5e-3 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_token_of_each_of_several_answers_is_as_one_alone(rows: int, int8: bool, dtype: torch.dtype) -> None:
    model = model_of("qwen3").to(dtype)
    if int8:
        quantize_weights(model)
    engine = engine_of(model)
    steps(engine)  # compares it with the model
    prompts = [ids(length).tolist() for length in (20, 55, 31)][:rows]
    caches = [[generation_cache([engine.prefill(prompt)[0]], room=2) for prompt in prompts] for _ in range(2)]
    alone = torch.cat([engine.forward([7 + i], cache) for i, cache in enumerate(caches[0])])
    with engine.exclusive(), torch.no_grad():
        together = engine._together([[7 + i] for i in range(rows)], caches[1])
    got = torch.cat([prediction.logits for prediction in together])
    off = (got - alone).float().norm() / alone.float().norm()
    assert off < (1e-5 if dtype == torch.float32 and not int8 else 2e-2)
    assert [cache.get_seq_length() for cache in caches[1]] == [len(prompt) + 1 for prompt in prompts]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma", {}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("llama", {"_attn_implementation": "eager"}),
    ],
)
def test_a_model_of_another_form_takes_its_steps_itself(kind: str, settings: dict[str, object]) -> None:
    engine = engine_of(model_of(kind, **settings))
    torch.testing.assert_close(steps(engine), wanted(engine.model), atol=1e-5, rtol=1e-5)
    assert engine._step is None


def test_a_model_whose_logits_differ_takes_its_steps_itself() -> None:
    engine = engine_of(model_of("llama"))
    for layer in engine.model.model.layers:
        layer.self_attn.scaling = 0.1
    assert engine._step is not None
    for layer in engine.model.model.layers:
        layer.self_attn.scaling = 1.0
    torch.testing.assert_close(steps(engine), wanted(engine.model), atol=1e-5, rtol=1e-5)
    assert engine._step.agrees is False


def test_weights_are_read_where_they_are() -> None:
    engine = engine_of(model_of("llama"))
    before = steps(engine)
    layer = engine.model.model.layers[1]
    layer.mlp.up_proj.weight = torch.nn.Parameter(-layer.mlp.up_proj.weight.detach())
    with torch.no_grad():
        layer.input_layernorm.weight.mul_(2)
    after = steps(engine)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, wanted(engine.model), atol=1e-5, rtol=1e-5)


def int8_model(kind: str) -> PreTrainedModel:
    model = model_of(kind, **FAMILIES[kind]).bfloat16()
    quantize_weights(model)
    return model


@pytest.mark.parametrize("kind", FAMILIES)
def test_int8_weights_of_one_input_are_multiplied_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(int8_model(kind))
    steps(engine)
    assert engine._step is not None
    assert engine._step.agrees
    outputs: list[int] = []
    product = torch._weight_int8pack_mm

    def counted(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        outputs.append(len(weight))
        return product(x, weight, scale)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", counted)
    steps(engine, 1)
    heads, inner = (4 + 2 + 2) * 32, 96
    prompt, step = [512], [heads, 64, 2 * inner, 64] * 3 + [512]
    assert outputs == prompt + step


def test_int8_weights_that_are_replaced_later_are_used() -> None:
    engine = engine_of(int8_model("llama"))
    before = steps(engine)
    layer = engine.model.model.layers[1]
    layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight.flip(0), requires_grad=False)
    with torch.no_grad():
        layer.mlp.gate_proj.scale.mul_(32)  # at the same address
    after = steps(engine)
    engine.__dict__["_step"] = None
    own = steps(engine)
    assert (after - before).float().norm() > 0.1 * own.float().norm()
    assert (after - own).float().norm() < 0.02 * own.float().norm()


def test_a_hook_that_is_registered_later_is_called() -> None:
    engine = engine_of(model_of("llama"))
    steps(engine)
    seen: list[object] = []
    handle = engine.model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *call: seen.append(call))
    seen.clear()
    steps(engine)
    assert len(seen) == 1 + 3  # the prompt, and each step
    handle.remove()
    steps(engine)
    assert engine._step is not None
    assert len(seen) == 4


def test_an_adapter_that_is_loaded_later_is_part_of_a_step() -> None:
    peft = pytest.importorskip("peft")
    engine = engine_of(model_of("llama"))
    before = steps(engine)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, engine.model)
    after = steps(engine)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, wanted(engine.model), atol=1e-5, rtol=1e-5)
    assert engine._step is not None
    assert engine._step.agrees


# --- oneDNN's setting is the process's -----------------------------------------------------------------------------

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("used", [True, False])
def test_onednn_is_used_after_a_step_if_it_was_before(used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_quick_without_onednn", lambda: True)
    engine = engine_of(model_of("llama").bfloat16())
    seen: list[bool] = []
    monkeypatch.setattr(cpu, "linear", lambda x, w: seen.append(mkldnn.enabled) or torch.nn.functional.linear(x, w))
    mkldnn.enabled = used
    try:
        steps(engine)
        assert mkldnn.enabled == used
    finally:
        mkldnn.enabled = True
    assert seen
    assert not any(seen)


@needs_onednn
def test_onednn_is_used_again_after_an_error_and_where_other_answers_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_quick_without_onednn", lambda: True)
    engine = engine_of(model_of("llama").bfloat16())
    steps(engine)
    seen: list[bool] = []
    monkeypatch.setattr(engine.lock, "pause", lambda: seen.append(mkldnn.enabled))
    steps(engine)
    assert len(seen) > 3
    assert all(seen)
    monkeypatch.setattr(cpu, "one_query", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps(engine)
    assert mkldnn.enabled


@needs_onednn
def test_the_last_of_several_threads_restores_onednn() -> None:
    first, second = threading.Event(), threading.Event()

    def other() -> None:
        with cpu._without_onednn:
            first.set()
            second.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    first.wait(10)
    with cpu._without_onednn:
        pass
    assert not mkldnn.enabled
    second.set()
    thread.join()
    assert mkldnn.enabled


def test_a_tiny_model_has_a_step() -> None:
    assert Step.of(tiny_model()) is not None
