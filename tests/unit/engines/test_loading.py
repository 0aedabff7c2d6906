"""What `HFEngine.from_pretrained` makes of a checkpoint on a CPU: its dtype, and int8 weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcag import HFEngine
from kvcag.cache.layers import generation_cache
from kvcag.engines import loading
from kvcag.engines.loading import Int8Linear, is_quick_at_bf16, joined, quantize_weights
from kvcag.errors import InvalidInputError, UnsupportedModelError
from kvcag.testing import byte_tokenizer, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path, torch.float32)


def saved(folder: Path, dtype: torch.dtype, **config: object) -> Path:
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, **config}
    tiny_model(dtype=dtype, **sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def quick(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    monkeypatch.setattr(loading, "is_quick_at_bf16", lambda: yes)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_bf16_where_the_processor_is_quick_at_it(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, stored)
    quick(monkeypatch, True)
    assert HFEngine.from_pretrained(tmp_path, device="cpu").model.dtype is torch.bfloat16
    quick(monkeypatch, False)
    engine = HFEngine.from_pretrained(tmp_path, device="cpu")
    assert engine.model.dtype is torch.float32
    right = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(engine.model.lm_head.weight, right.lm_head.weight)  # type: ignore[union-attr]


def test_fp32_weights_stay_exact_and_a_dtype_that_is_given_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch, True)
    assert HFEngine.from_pretrained(folder, device="cpu").model.dtype is torch.float32
    quick(monkeypatch, False)
    assert HFEngine.from_pretrained(folder, "bfloat16", "cpu").model.dtype is torch.bfloat16


def test_whether_a_processor_is_quick_at_bf16_is_measured_once() -> None:
    assert is_quick_at_bf16() is is_quick_at_bf16()
    assert is_quick_at_bf16.cache_info().misses == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_weights_compute_what_the_model_computes_to_their_rounding(dtype: str, folder: Path) -> None:
    plain = HFEngine.from_pretrained(folder, dtype, "cpu")
    int8 = HFEngine.from_pretrained(folder, dtype, "cpu", int8_weights=True)
    ids = list(range(40, 90))
    right, got = (engine.forward(ids, generation_cache([], 1)).float() for engine in (plain, int8))
    assert (got - right).norm() / right.norm() < 0.03
    assert "int8 weights" in repr(int8)
    assert "int8 weights" not in repr(plain)


def test_int8_weights_compute_the_same_for_one_token_as_for_many(folder: Path) -> None:
    engine = HFEngine.from_pretrained(folder, "float32", "cpu", int8_weights=True)
    ids = list(range(40, 90))
    at_once = engine.forward(ids, generation_cache([], 1))
    cache = generation_cache([], 1)
    for start, stop in ((0, 40), (40, 48), (48, 49), (49, 50)):
        one_by_one = engine.forward(ids[start:stop], cache)
    torch.testing.assert_close(one_by_one, at_once, atol=1e-5, rtol=1e-5)


def test_a_model_with_int8_weights_is_another_model(folder: Path) -> None:
    plain = HFEngine.from_pretrained(folder, "float32", "cpu")
    int8, again = (HFEngine.from_pretrained(folder, "float32", "cpu", int8_weights=True) for _ in range(2))
    assert not int8.fingerprint.matches(plain.fingerprint)
    assert int8.fingerprint.matches(again.fingerprint)


def test_int8_weights_take_half_of_the_bytes_of_bf16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch, True)
    model = HFEngine.from_pretrained(folder, device="cpu", int8_weights=True).model
    assert model.dtype is torch.bfloat16  # exactness is gone already
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 3 * 7
    assert all(layer.weight.dtype is torch.int8 for layer in layers)
    assert type(model.lm_head) is torch.nn.Linear  # 261 outputs: the kernel would write past them


def test_int8_weights_of_one_input_are_one_layer_without_a_copy(folder: Path) -> None:
    model = HFEngine.from_pretrained(folder, "float32", "cpu", int8_weights=True).model
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    whole = joined(layers)
    assert whole is not None
    assert whole.weight.data_ptr() == attention.q_proj.weight.data_ptr()
    x = torch.randn(3, whole.in_features)
    torch.testing.assert_close(whole(x), torch.cat([layer(x) for layer in layers], -1))
    assert joined([attention.q_proj, attention.v_proj]) is None  # k_proj is between them
    attention.k_proj.weight.data = attention.k_proj.weight.clone()
    assert joined(layers) is None


def test_int8_weights_beside_a_layer_without_bias_are_one_layer_too() -> None:
    """Regression: in Qwen2, the output projection has as many inputs as q, k and v, but no bias."""
    model = tiny_model("qwen2", hidden_size=128, num_attention_heads=4, head_dim=32, num_key_value_heads=2)
    quantize_weights(model)
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert attention.o_proj.in_features == attention.q_proj.in_features
    assert attention.q_proj.bias is not None
    whole = joined(layers)
    assert whole is not None
    x = torch.randn(3, whole.in_features)
    torch.testing.assert_close(whole(x), torch.cat([layer(x) for layer in layers], -1))


def test_int8_weights_are_refused_where_they_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="int8_weights needs a CPU, but the model goes to cuda"):
        HFEngine.from_pretrained("no such model", device="cuda", int8_weights=True)
    with pytest.raises(InvalidInputError, match="goes to a device_map"):
        HFEngine.from_pretrained("no such model", device_map="auto", int8_weights=True)
    odd = saved(tmp_path / "odd", torch.float32, hidden_size=24, head_dim=4, intermediate_size=24)
    with pytest.raises(UnsupportedModelError, match="multiples of 32"):
        HFEngine.from_pretrained(odd, device="cpu", int8_weights=True)
