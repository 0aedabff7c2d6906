"""Two models that compute differently never have the same fingerprint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcag import HFEngine, KVCacheMemory
from kvcag.fingerprint import ModelFingerprint, WeightsWatch
from kvcag.testing import byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
IDS = torch.arange(40)[None] % 250


def fingerprint(model: Any) -> ModelFingerprint:
    return ModelFingerprint.of(model, TOKENIZER)


def edited(model: Any, name: str, edit: Callable[[torch.Tensor], object]) -> Any:
    with torch.no_grad():
        edit(dict(model.named_parameters())[name])
    return model


def granite(**multipliers: float) -> Any:
    usual = {"embedding_multiplier": 12.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2}
    return tiny_model("granite", **usual | multipliers)


DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.layers.2.input_layernorm.weight"
PAIRS: dict[str, tuple[Any, Any]] = {
    "rms_norm_eps": (tiny_model(rms_norm_eps=1e-6), tiny_model(rms_norm_eps=1e-2)),
    "hidden_act": (tiny_model(hidden_act="silu"), tiny_model(hidden_act="gelu")),
    "sliding window": (tiny_model("mistral", sliding_window=8), tiny_model("mistral", sliding_window=None)),
    "embedding multiplier": (granite(), granite(embedding_multiplier=6.0)),
    "residual multiplier": (granite(), granite(residual_multiplier=1.0)),
    "attention multiplier": (granite(), granite(attention_multiplier=1.0)),
    "query_pre_attn_scalar": tuple(tiny_model("gemma2", query_pre_attn_scalar=scalar) for scalar in (8, 256)),
    "one weight of many": (tiny_model(), edited(tiny_model(), DOWN, lambda weight: weight[3, 5].mul_(40))),
    "two weights swapped": (
        tiny_model(),
        edited(tiny_model(), DOWN, lambda weight: weight[0, :4].copy_(weight[0, [2, 3, 0, 1]])),
    ),
    "the last bit of one weight": (
        tiny_model(),
        edited(tiny_model(), NORM, lambda weight: weight.view(torch.int32)[7].bitwise_xor_(1 << 20)),
    ),
    "rope theta": (tiny_model(rope_theta=1e4), tiny_model(rope_theta=1e6)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_models_that_compute_differently_have_other_fingerprints(name: str) -> None:
    """Nine of these pairs had one."""
    one, other = PAIRS[name]
    with torch.no_grad():
        assert not torch.equal(*(model(IDS).logits for model in (one, other)))
    ours, theirs = fingerprint(one), fingerprint(other)
    assert not ours.matches(theirs)
    assert ours.differences(theirs)


def test_the_same_model_has_the_same_fingerprint_wherever_it_lies(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert fingerprint(again).differences(fingerprint(model)) == []
    again.config.eos_token_id = 7
    again.config.use_cache = False
    assert fingerprint(again).matches(fingerprint(model))


def test_a_difference_names_the_setting() -> None:
    one, other = PAIRS["rms_norm_eps"]
    assert fingerprint(one).differences(fingerprint(other)) == ["config.rms_norm_eps: 0.01, not 1e-06"]


def test_weights_that_are_not_contiguous_or_not_at_the_beginning_of_their_memory() -> None:
    plain, moved = tiny_model(), tiny_model()
    for module in moved.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                memory = torch.empty(weight.numel() + 3)[3:].view(weight.shape)
                memory.copy_(weight.detach())
                module._parameters[name] = torch.nn.Parameter(memory, requires_grad=False)
    assert fingerprint(moved).matches(fingerprint(plain))


# --- changes of a live model ----------------------------------------------------------------------------------------


class Lora(torch.nn.Module):
    """A layer with an adapter, under the names of PEFT: what is loaded, switched, merged and unloaded."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self._active_adapter, self._disable_adapters, self.merged_adapters = ["a"], False, []

    def add(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.lora_A[name] = torch.nn.Linear(self.base_layer.in_features, 2, bias=False)
        self.lora_B[name] = torch.nn.Linear(2, self.base_layer.out_features, bias=False)
        self.scaling[name] = 2.0

    def delta(self, name: str) -> torch.Tensor:
        return self.scaling[name] * self.lora_B[name].weight.detach() @ self.lora_A[name].weight.detach()

    def merge(self) -> None:
        self.base_layer.weight.data += self.delta(self._active_adapter[0])
        self.merged_adapters.append(self._active_adapter[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(x)
        if self._disable_adapters or self.merged_adapters:
            return out
        return out + sum(x @ self.delta(name).T for name in self._active_adapter)


@pytest.fixture
def engine() -> HFEngine:
    return HFEngine(tiny_model(), TOKENIZER)


def load(engine: HFEngine) -> Lora:
    attention = engine.model.model.layers[1].self_attn
    attention.v_proj = Lora(attention.v_proj)
    attention.v_proj.add("a", 1)
    attention.v_proj.add("b", 2)
    return attention.v_proj


def test_switching_merging_and_unloading_adapters_is_seen_at_once_and_the_way_back_finds_the_model(
    engine: HFEngine,
) -> None:
    plain = engine.fingerprint
    lora = load(engine)
    a = engine.fingerprint
    assert (plain.adapter, a.adapter) == (None, "a")
    lora._active_adapter = ["b"]
    b = engine.fingerprint
    lora.scaling["b"] = 1.0
    half = engine.fingerprint
    lora.scaling["b"] = 2.0
    assert len({each.digest for each in (plain, a, b, half)}) == 4
    assert engine.fingerprint == b
    lora._active_adapter = ["a"]
    assert engine.fingerprint == a
    lora._disable_adapters = True
    assert engine.fingerprint == plain
    lora._disable_adapters = False
    lora.merge()
    merged = engine.fingerprint
    assert merged.digest not in {each.digest for each in (plain, a, b)}
    engine.model.model.layers[1].self_attn.v_proj = lora.base_layer
    assert engine.fingerprint == merged
    lora.base_layer.load_state_dict(tiny_model().model.layers[1].self_attn.v_proj.state_dict())
    assert engine.fingerprint == plain


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: model.model.norm.weight.detach().add_(1),
        lambda model: setattr(model.model, "norm", torch.nn.Identity()),
        lambda model: model.to(torch.float64),
        lambda model: setattr(model.model.norm, "weight", torch.nn.Parameter(torch.full((32,), 0.5))),
    ],
    ids=["in place", "another module", "another dtype", "another parameter"],
)
def test_a_changed_weight_is_seen_at_once(engine: HFEngine, edit: Callable[[Any], object]) -> None:
    before = engine.fingerprint
    edit(engine.model)
    assert not engine.fingerprint.matches(before)


def test_what_another_adapter_computed_is_not_reused(engine: HFEngine) -> None:
    memory = KVCacheMemory(engine)
    memory.add("The library opens at nine.")
    prompt = "When does it open? " * 4
    fresh = HFEngine(tiny_model(), TOKENIZER)
    load(fresh)
    memory.ask(prompt, max_new_tokens=6)
    load(engine)
    assert engine.known_prefix(engine.template.prompt([{"role": "user", "content": prompt}]).token_ids) == 0
    said = str(memory.ask(prompt, max_new_tokens=6))
    other = KVCacheMemory(fresh)
    other.add("The library opens at nine.")
    assert said == str(other.ask(prompt, max_new_tokens=6))


def test_looking_for_changes_is_cheap(engine: HFEngine) -> None:
    _ = engine.fingerprint
    began = time.process_time()
    watch = WeightsWatch(engine.model)
    for _ in range(100):
        assert not watch.sees_change()
    assert time.process_time() - began < 1
