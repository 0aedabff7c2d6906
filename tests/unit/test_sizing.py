from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoConfig
from typer.testing import CliRunner

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import layers_of, nbytes
from kvcag.cli.app import app
from kvcag.errors import InvalidInputError, UnsupportedModelError
from kvcag.sizing import DTYPE_BYTES, KVGeometry, LayerGeometry, break_even, kv_geometry
from kvcag.stores.disk import DiskStore
from kvcag.testing import SMALL, byte_tokenizer, tiny_model
from tests.unit.test_families import SHARED

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": {},
    "llama, one KV head": {"num_key_value_heads": 1},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": MIXED},
    "phi": {},
    "gpt_neox": {"num_key_value_heads": 4},  # it has a KV head for each query head
    "starcoder2": {"sliding_window": 16},
    "gpt_oss": {"sliding_window": 16, "layer_types": MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "kv_lora_rank": 24,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 3,
        "num_key_value_heads": 4,
    },
    "gemma4_text": SHARED,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_bytes_are_those_of_a_real_cache(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family.split(",")[0], dtype=dtype, **FAMILIES[family])
    engine = HFEngine(model, byte_tokenizer())
    length = 40  # longer than the windows
    layers, _ = engine.prefill(list(range(length)))
    geometry = kv_geometry(model.config)
    assert geometry.bytes_per_token(str(dtype).removeprefix("torch.")) * length == nbytes(layers)
    assert geometry.bytes_per_token(str(dtype).removeprefix("torch.")) == engine.bytes_per_token
    assert geometry.attention_heads == model.config.num_attention_heads


def test_windows_are_named_and_counted_in_full() -> None:
    mixed = kv_geometry(AutoConfig.for_model("gemma3_text", **{**SMALL, **FAMILIES["gemma3_text"]}))
    plain = kv_geometry(AutoConfig.for_model("llama", **SMALL))
    assert [layer.window for layer in mixed.layers] == [16, None, 16]
    assert (mixed.sliding_layers, plain.sliding_layers) == (2, 0)
    assert mixed.bytes_per_token("bfloat16") == plain.bytes_per_token("bfloat16")


def test_int8_is_what_a_store_writes(tmp_path: Path, tiny_engine: HFEngine) -> None:
    item = KVCacheMemory(tiny_engine).extract("a document " * 30)
    store = DiskStore(tmp_path, quantize="int8")
    store.put(item)
    geometry = kv_geometry(tiny_engine.model.config)
    tensors = geometry.bytes_per_token("float32", int8=True) * len(item.token_ids)
    manifest_and_ids = next(tmp_path.rglob("*.safetensors")).stat().st_size - tensors
    assert 8 * len(item.token_ids) < manifest_and_ids < 8 * len(item.token_ids) + 6000
    read = store.get(item.id)
    assert read is not None
    assert nbytes(layers_of(read.memory)) == geometry.bytes_per_token("float32") * len(item.token_ids)


def test_a_folder_its_file_and_what_is_in_it_are_the_same_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SMALL, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    sizes = {kv_geometry(given).bytes_per_token() for given in (tmp_path, tmp_path / "config.json", described, config)}
    assert sizes == {2 * 3 * 2 * 8 * 2}


def test_layers_that_differ_are_counted_one_by_one() -> None:
    if not hasattr(AutoConfig.for_model("llama"), "is_heterogeneous"):
        pytest.skip("this transformers describes no layer by itself")
    config = AutoConfig.for_model("gemma4_text")
    geometry = kv_geometry(config)
    assert {layer.key_dim for layer in geometry.layers} == {256, 512}


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        ("no/such/model", InvalidInputError, "pass the folder"),
        ({"hidden_size": 3}, InvalidInputError, "model_type"),
        ({"model_type": "no-such"}, InvalidInputError, "does not know"),
        ({"model_type": "t5"}, UnsupportedModelError, "encoder-decoder"),
        ({"model_type": "rwkv"}, UnsupportedModelError, "state that transformers does not put into a cache"),
    ],
    ids=str,
)
def test_what_cannot_be_counted_is_refused(model: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        kv_geometry(model)


def test_a_folder_without_a_configuration_and_a_dtype_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"no config\.json"):
        kv_geometry(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidInputError, match=r"not a model's config\.json"):
        kv_geometry(tmp_path / "config.json")
    geometry = kv_geometry({"model_type": "llama", **SMALL})
    with pytest.raises(InvalidInputError, match="names no dtype"):
        geometry.bytes_per_token()
    with pytest.raises(InvalidInputError, match="float32, float16, bfloat16"):
        geometry.bytes_per_token("int4")


positive = st.floats(1e-3, 1e12)


@given(st.integers(1, 10**6), st.integers(1, 10**6), positive, positive, st.floats(0, 10))
def test_at_break_even_loading_takes_as_long_as_encoding(
    tokens: int, size: int, prefill: float, load: float, latency: float
) -> None:
    assume(not 0.999 < size * prefill / load < 1.001)  # else both take the same time at any length
    made = break_even(tokens, size, prefill, load, latency)
    if tokens > made.even_tokens * 1.001:
        assert made.load
    elif tokens < made.even_tokens * 0.999:
        assert not made.load
    if math.isfinite(made.even_bytes_per_s):
        at_even = break_even(tokens, size, prefill, made.even_bytes_per_s, latency)
        assert at_even.load_s == pytest.approx(at_even.encode_s)
    else:
        assert not made.load or latency == made.encode_s


@pytest.mark.parametrize("wrong", [(0, 1, 1, 1, 0), (1, 1, 0, 1, 0), (1, 1, 1, -1, 0), (1, 1, 1, 1, -1)])
def test_speeds_must_be_positive(wrong: tuple[int, int, float, float, float]) -> None:
    with pytest.raises(InvalidInputError, match="must be"):
        break_even(*wrong)


def test_every_dtype_is_one_of_torchs() -> None:
    assert {name: torch.empty(0, dtype=getattr(torch, name)).element_size() for name in DTYPE_BYTES} == DTYPE_BYTES


# --- the command, and the page's calculator -------------------------------------------------------------------------


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["size", *map(str, arguments)])
    return done.exit_code, done.output


@pytest.fixture
def config(tmp_path: Path) -> Path:
    AutoConfig.for_model("llama", **SMALL, dtype="bfloat16").save_pretrained(tmp_path)
    return tmp_path / "config.json"


def test_the_command_says_it_in_json_and_to_people(config: Path) -> None:
    code, said = run("-m", config, "--tokens", 10, "--documents", 3, "--json")
    made = json.loads(said)
    assert (code, made["bytes_per_token"], made["bytes"], made["break_even"]) == (0, 192, 5760, {})
    assert made["bytes_per_token_int8"] == 3 * 2 * 2 * (8 + 2)
    code, said = run("-m", config, "--tokens", 10, "--documents", 3)
    assert code == 0
    assert "3 layers, 2 KV heads of 8 numbers (2 query heads for each)" in said
    assert "5.8 kB" in said


@pytest.mark.parametrize(("tokens", "more"), [(0, 0), (255, 0), (256, 256 * 192)])
def test_the_command_counts_an_instruction_that_a_store_keeps(config: Path, tokens: int, more: int) -> None:
    sizes = "-m", config, "--tokens", 10, "--documents", 3, "--instruction-tokens", tokens
    made = json.loads(run(*sizes, "--json")[1])
    assert (made["bytes"], made["bytes_int8"]) == (5760 + more, 10 * 3 * 3 * 2 * 2 * (8 + 2))  # none is stored as int8
    assert ("54.9 kB" in run(*sizes)[1]) == bool(more)


@pytest.mark.parametrize(
    ("speeds", "says"),
    [
        ((1000, 1e9, 0), "load: loading takes 0.0 ms, encoding 10.0 ms; loading is faster at any length"),
        ((1000, 1e9, 2), "load: loading takes 2.0 ms, encoding 10.0 ms; loading is faster from 3 tokens"),
        (
            (1000, 1e3, 0),
            "encode: loading takes 1,920.0 ms, encoding 10.0 ms; loading is faster above 192 kB",
        ),
        ((1000, 1e9, 20), "encode: loading takes 20.0 ms, encoding 10.0 ms; the latency alone takes longer"),
    ],
)
def test_the_command_says_which_is_sooner(config: Path, speeds: tuple[float, float, float], says: str) -> None:
    options = ("--prefill-tokens-per-s", speeds[0], "--load-bytes-per-s", speeds[1], "--latency-ms", speeds[2])
    code, said = run("-m", config, "--tokens", 10, *options)
    assert code == 0
    assert f"bfloat16: {says}" in said
    kept = json.loads(run("-m", config, "--tokens", 10, *options, "--json")[1])["break_even"]["kept"]
    assert kept["load"] is says.startswith("load")
    assert "it is computed again in 10.0 ms, and takes 1.9 kB more" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-m", "no/such/model"), "no/such/model"),
        (("--dtype", "int4"), "float32, float16, bfloat16"),
        (("--load-bytes-per-s", "3e9"), "go together"),
        (("--prefill-tokens-per-s", "0", "--load-bytes-per-s", "1"), "more than 0"),
    ],
)
def test_what_cannot_work_is_the_users_mistake(config: Path, arguments: tuple[str, ...], says: str) -> None:
    code, said = run(*(arguments if "-m" in arguments else ("-m", config, *arguments)))
    assert code == 2
    assert says in said
    assert "Traceback" not in said


CALCULATOR = Path(__file__).parents[2] / "docs" / "js" / "sizing.js"


@pytest.mark.skipif(shutil.which("node") is None, reason="the calculator's script is compared where node is installed")
def test_the_pages_calculator_reckons_as_we_do() -> None:
    cases = [(36, 8, 128, "bfloat16", 6064, 27_800.0, 3e9, 0.0002), (3, 2, 8, "float32", 5, 1e6, 1e3, 0.0)]
    script = f"""
        const {{ MODELS, bytesPerToken, breakEven }} = require({json.dumps(str(CALCULATOR))});
        const made = {json.dumps(cases)}.map(([layers, kvHeads, headDim, dtype, tokens, ...speeds]) => {{
            const sizes = [false, true].map((int8) => bytesPerToken({{ layers, kvHeads, headDim }}, dtype, int8));
            return [sizes, breakEven(tokens, sizes[0], ...speeds)];
        }});
        console.log(JSON.stringify([MODELS, made]));"""
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True, timeout=60)
    models, made = json.loads(done.stdout)
    assert len(models) >= 4
    for (layers, heads, dim, dtype, tokens, prefill, load, latency), (sizes, even) in zip(cases, made, strict=True):
        geometry = KVGeometry("m", (LayerGeometry(heads, dim, dim),) * layers, heads, None, None)
        assert sizes == [geometry.bytes_per_token(dtype), geometry.bytes_per_token(dtype, int8=True)]
        ours = break_even(tokens, sizes[0], prefill, load, latency)
        assert even["loadS"] == pytest.approx(ours.load_s)
        assert even["encodeS"] == pytest.approx(ours.encode_s)
        for theirs, mine in ((even["evenTokens"], ours.even_tokens), (even["evenBytesPerS"], ours.even_bytes_per_s)):
            assert theirs == (pytest.approx(mine) if math.isfinite(mine) else None)
