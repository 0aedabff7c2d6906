"""Models with recurrent layers: a prompt goes on from the deepest place whose states were kept, exactly."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import _CONTINUES, Layers, generation_cache, kinds_of, layers_of, nbytes
from kvcag.sizing import kv_geometry
from kvcag.stores.format import item_from_bytes, item_to_bytes
from kvcag.testing import byte_tokenizer, tiny_model
from tests.families import MAMBA, OWN

if not _CONTINUES:
    pytest.skip("recurrent layers need transformers 5.24", allow_module_level=True)

MIXED = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    **MIXED,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {**DELTA, **MOE, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA,
    "olmo_hybrid": DELTA,
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"], "mamba_expand": 2, **MAMBA},
    "bamba": {"attn_layer_indices": [2], **MAMBA},
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 64},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2, "mamba_d_state": 8, "num_experts": 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"]},
    "zamba2": OWN["zamba2"],
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 4},
    "mamba": {},
}
TEXTS = ["The library opens at nine. " * 8, "It is in Harbour Street. " * 8]


def engine_of(model: PreTrainedModel, **settings: Any) -> HFEngine:
    return HFEngine(model, byte_tokenizer(), **settings)


def bare(model: PreTrainedModel) -> HFEngine:
    """An engine that keeps nothing, so that every prompt is a full prefill."""
    return engine_of(model, prefix_cache_bytes=0)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made = tiny_model(request.param, **FAMILIES[request.param])
    assert kinds_of(made), "it has recurrent layers"
    return made


def test_a_second_question_prefills_what_is_new_and_answers_as_a_full_prefill(model: PreTrainedModel) -> None:
    memory, plain = KVCacheMemory(engine_of(model)), KVCacheMemory(bare(model))
    memory.add(TEXTS)
    plain.add(TEXTS)
    context = 0
    for count, question in enumerate(("When?", "Where is it, please?", "When?")):
        answer = memory.ask(question, max_new_tokens=8)
        assert answer.text == plain.ask(question, max_new_tokens=8).text
        assert answer.report is not None
        assert answer.report.is_exact
        assert answer.report.encoded_tokens == (0 if count else answer.report.encoded_tokens)
        context = answer.report.context_tokens
        assert count == 0 or answer.usage.cached_tokens >= context


def test_a_second_turn_prefills_what_is_new_and_answers_as_a_full_prefill(model: PreTrainedModel) -> None:
    engine, plain = engine_of(model), bare(model)
    said: list[Any] = [{"role": "user", "content": "hello there " * 10}]
    before = 0
    for turn in range(3):
        prompt = engine.build_prompt(said)
        chunks = list(engine.stream(prompt, engine.sampling(max_new_tokens=8)))
        text = "".join(chunk.text for chunk in chunks)
        expected = plain.stream(prompt, plain.sampling(max_new_tokens=8))
        assert text == "".join(chunk.text for chunk in expected)
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.cached_tokens >= before, "all of the prompt before is reused"
        before = len(prompt.token_ids)
        said += [{"role": "assistant", "content": text}, {"role": "user", "content": f"and then {turn}?"}]


READS = """
import json, sys
from pathlib import Path
from tests.unit.test_recurrent import FAMILIES, read_back
print(json.dumps({name: read_back(name, Path(sys.argv[1])) for name in FAMILIES}))
"""


def read_back(name: str, folder: Path) -> list[Any]:
    """What is in a family's store, and what is answered from it: a digest, the text, and the tokens reused."""
    memory = KVCacheMemory(engine_of(tiny_model(name, **FAMILIES[name])), folder / name)
    answer = memory.ask("When?", strategy="exact", max_new_tokens=8)
    assert answer.report is not None
    return [digest_of(memory), answer.text, answer.report.reused_tokens]


def digest_of(memory: KVCacheMemory) -> str:
    """Over the token ids, keys, values, states and maps of its one item."""
    (item,) = memory.get_all()
    layers = layers_of(item.memory)
    assert layers.states is not None
    kept = [item.token_ids, *chain(*layers), *layers.states.flat]
    return sha256(b"".join(t.contiguous().numpy().tobytes() for t in kept)).hexdigest()


def test_what_is_stored_is_loaded_equal_by_a_fresh_process_and_answers_as_a_full_prefill(tmp_path: Path) -> None:
    expected = {}
    for name, config in FAMILIES.items():
        made = tiny_model(name, **config)
        memory, plain = KVCacheMemory(engine_of(made), tmp_path / name), KVCacheMemory(bare(made))
        (item_id,) = memory.add(TEXTS[0])
        plain.add(TEXTS[0])
        all_but_the_head = len(memory.get(item_id).token_ids)
        expected[name] = [digest_of(memory), plain.ask("When?", max_new_tokens=8).text, all_but_the_head]
    command = [sys.executable, "-c", READS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_an_item_reads_back_as_it_was_written(model: PreTrainedModel) -> None:
    item = KVCacheMemory(engine_of(model)).extract(TEXTS[0])
    again = item_from_bytes(item_to_bytes(item), "item")
    written, read = layers_of(item.memory), layers_of(again.memory)
    assert written.states is not None
    assert read.states is not None
    assert written.tokens == read.tokens == len(item.token_ids)
    for left, right in zip(written.states.flat, read.states.flat, strict=True):
        assert torch.equal(left, right)


def test_sizing_counts_the_states(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    geometry = kv_geometry(model.config)
    assert geometry.bytes_per_token("float32") == engine.bytes_per_token
    states = layers_of(engine.encode_item((), list(range(97, 107))).memory).states
    assert states is not None
    size = nbytes(Layers((), states))
    # in float32 the inputs of convolutions take twice the bytes that are counted; a number a head is not counted
    assert geometry.state_bytes + geometry.map_bytes <= size <= 2 * geometry.state_bytes + geometry.map_bytes + 1024


@torch.no_grad()
def test_a_model_whose_weights_are_offloaded_in_one_call_answers_as_the_whole_one(model: PreTrainedModel) -> None:
    """Positions were put on `meta`, where the decoder's weights are between two passes."""
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    engines, asked = (engine_of(offloaded), bare(model)), [{"role": "user", "content": TEXTS[0]}]
    for messages in (asked, [*asked, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}]):
        prompt = engines[1].build_prompt(messages)
        said, right = ([*map(str, each.stream(prompt, each.sampling(max_new_tokens=4)))] for each in engines)
        assert said == right


def test_a_prompt_in_two_passes_has_the_logits_of_one(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():  # states that a token later are not forgotten
        if name.endswith("A_log"):
            parameter.data.clamp_(max=-2.0)
    engine, ids = bare(model), list(range(97, 122)) * 2
    once = engine.forward(ids, generation_cache([], 50, kinds_of(model)))
    cache = generation_cache([], 50, kinds_of(model))
    engine.forward(ids[:30], cache)
    twice = engine.forward(ids[30:], cache)
    assert float((twice - once).abs().max()) < 1e-5 * float(once.std())


def test_a_long_prompt_is_kept_at_distances_that_cost_no_more_than_its_keys() -> None:
    model = tiny_model("qwen3_5_text", **DELTA, max_position_embeddings=8192)
    engine = engine_of(model)
    long = list(range(97, 123)) * 120
    engine.prefill(long)
    edited = [*long[:2600], *long[:300]]
    reused = engine.known_prefix(edited)
    assert 1500 <= reused <= 2600, "from the middle of a segment, too"
    states = layers_of(engine.encode_item((), long[:10]).memory).states
    assert states is not None
    size = sum(state.numel() * state.element_size() for state in states.flat)
    assert engine.prefixes.nbytes <= 2 * (len(long) * engine.bytes_per_token + size)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=3, deadline=None, derandomize=True, database=None)
def test_whatever_is_edited_in_a_conversation_the_answer_is_a_full_prefills(model: PreTrainedModel, seed: int) -> None:
    """Three conversations of six edits with each of twelve families: 216 edits."""
    chance = random.Random(seed)
    engine, plain = engine_of(model, prefix_cache_bytes=4 << 20), bare(model)
    said: list[Any] = [{"role": "user", "content": "hello"}]
    for _ in range(6):
        edit, at = chance.choice(["say", "drop", "change", "shorten"]), chance.randrange(len(said))
        if edit == "drop" and len(said) > 1:
            del said[at]
        elif edit == "shorten":
            said[at] = {**said[at], "content": said[at]["content"][: chance.randrange(1, 9)]}
        elif edit == "say":
            said.insert(at, {"role": chance.choice(["user", "assistant"]), "content": "by the way"})
        else:
            said[at] = {**said[at], "content": chance.choice(["yes", "no", "perhaps " * 20])}
        prompt = engine.build_prompt([*said, {"role": "user", "content": "and?"}])
        answers = [
            "".join(chunk.text for chunk in one.stream(prompt, one.sampling(max_new_tokens=4)))
            for one in (engine, plain)
        ]
        assert answers[0] == answers[1]
        said += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": answers[0] or "-"}]


def test_a_context_has_the_layers_of_its_model(model: PreTrainedModel) -> None:
    """Regression: it had the attention layers alone, so a later layer's keys were at another layer's index."""
    context = engine_of(model).build_kv_cache("The library opens at nine.")
    assert len(context.layers) == model.config.get_text_config(decoder=True).num_hidden_layers
