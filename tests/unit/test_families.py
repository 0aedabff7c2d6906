"""Every family of decoders: merged caches are right, or the model is refused."""

import pytest
import torch
import transformers

from kvcag import HFEngine
from kvcag.cache.attention import PositionShift, Rotation, rotations
from kvcag.cache.layers import _CONTINUES, _LATENT
from kvcag.cache.merge import check_mergeable, merge
from kvcag.errors import UnsupportedModelError
from kvcag.testing import byte_tokenizer, tiny_model
from tests.merging import encode, encode_at, error, ids, parts_of, tokens_of

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    **MOE,
}
SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 259,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}

MERGEABLE = {
    "llama": {},
    "llama linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama llama3": {"rope_scaling": LLAMA3},
    "llama yarn": {"rope_scaling": YARN},
    "llama tied, one KV head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama eager": {"attn_implementation": "eager"},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma": {},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": MIXED},
    "mixtral": {"sliding_window": 16, "num_local_experts": 4, **MOE},
    "qwen3_moe": {"num_experts": 4, **MOE},
    "phi": {},
    "phi3": {"sliding_window": 16},
    "gpt_neox": {},
    "stablelm": {},
    "granite": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "starcoder2": {"sliding_window": 16},
    "glm": {},
    "cohere": {},
    "cohere2": {"sliding_window": 16, "layer_types": MIXED},
    "gpt_oss": {"sliding_window": 16, "layer_types": MIXED, "num_local_experts": 4},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "gemma3n_text": {**SHARED, "laurel_rank": 8, "altup_num_inputs": 2},
    "gemma4_text": SHARED,
}

if transformers.__version__.startswith("4."):  # refused there: its attention is not behind the AttentionInterface
    del MERGEABLE["stablelm"]
    for family in ("glm4_moe_lite", "gemma3n_text", "gemma4_text"):  # not there, or otherwise
        del MERGEABLE[family]

REFUSED = {
    "llama dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic-NTK"),
    "llama longrope": (
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            }
        },
        "LongRoPE",
    ),
    "gpt2": ({}, "positions are learned"),
    "opt": ({"word_embed_proj_dim": 32, "ffn_dim": 48}, "positions are learned"),
    "bloom": ({"n_head": 4}, "ALiBi"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 3}, "ALiBi"),
    "mamba": ({"state_size": 4}, "recurrent layers"),
    "llama4_text": ({"num_local_experts": 2, "intermediate_size_mlp": 48}, "in chunks"),
    "phimoe": ({"sliding_window": 16, "num_local_experts": 4}, "does not pass one to its attention"),
}


def model_of(family: str, config: dict):
    return tiny_model(family.split()[0].rstrip(","), **config)


@pytest.fixture(params=MERGEABLE, scope="module")
def model(request):
    return model_of(request.param, MERGEABLE[request.param])


@pytest.fixture(scope="module")
def parts(model):
    documents = [ids(33, seed=1), ids(20, seed=2), ids(1, seed=3), ids(20, seed=2), ids(12, seed=4)]
    return parts_of(model, ids(7), documents)


def test_full_is_a_full_prefill(model, parts):
    merged = merge(model, parts, ids(9, seed=9), strategy="full")
    assert error(merged.layers, encode(model, tokens_of(parts))) < 1e-5
    assert merged.recomputed.tolist() == list(range(7 + 33, 7 + 33 + 20 + 1 + 20 + 12))


def test_going_on_over_a_cache_is_a_full_prefill(model):
    engine = HFEngine(model, byte_tokenizer())
    token_ids = ids(90)
    engine.prefill(token_ids[:33].tolist())
    layers, reused = engine.prefill(token_ids.tolist())
    assert reused == 33
    assert error(layers, encode(model, token_ids)) < 1e-5


@pytest.mark.parametrize(("start", "end"), [(0, 3), (7, 0), (7, 400), (900, 31)])
def test_rerotated_keys_are_keys_encoded_there(model, start, end):
    token_ids = ids(12)
    encoded, expected = (encode_at(model, token_ids, position) for position in (start, end))
    move = PositionShift(rotations(model), torch.arange(start, start + 12), torch.arange(end, end + 12))
    for index, kv in enumerate(encoded):
        move.turn(index, kv)
    assert error(encoded, expected) < 1e-4


@pytest.mark.parametrize("strategy", ["anchor", "deviation", "query"])
def test_recomputing_brings_the_cache_closer(model, parts, strategy):
    right = encode(model, tokens_of(parts))
    rotated = merge(model, parts, ids(9, seed=9), strategy="rotate")
    some = merge(model, parts, ids(9, seed=9), strategy=strategy, ratio=0.3)
    assert 0 < len(some.recomputed) <= 0.3 * len(tokens_of(parts))
    assert error(some.layers, right) < error(rotated.layers, right)


@pytest.mark.filterwarnings("ignore:`position_ids` have no functionality in BLOOM:FutureWarning")  # transformers 4
@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_what_to_do_instead(family):
    config, why = REFUSED[family]
    model = model_of(family, config)
    with pytest.raises(UnsupportedModelError, match=why) as refusal:
        check_mergeable(model)
    assert not _CONTINUES or "strategy='exact'" in str(refusal.value)


@pytest.mark.skipif(not _LATENT, reason="transformers before 5.15 caches the keys of every head")
def test_one_key_of_all_heads_is_rotated_beside_the_latents():
    assert all(rotation.of_values for rotation in rotations(model_of("deepseek_v3", LATENT)))


def test_layers_that_share_keys_have_none_of_their_own():
    model = model_of("gemma4_text", SHARED)
    assert len(rotations(model)) == model.config.num_hidden_layers - 2


def test_what_is_rotated_may_be_the_last_of_a_key():
    keys, at = torch.randn(1, 1, 5, 12), torch.arange(5)
    whole = Rotation(tiny_model("llama").model.rotary_emb, "inv_freq", start=4)
    turned = torch.empty_like(keys)
    whole.turn(keys, whole.angles(at, at + 9), turned)
    assert torch.equal(turned[..., :4], keys[..., :4])
    first = torch.empty_like(keys[..., 4:])
    Rotation(whole.module, "inv_freq").turn(keys[..., 4:], whole.angles(at, at + 9), first)
    assert torch.equal(turned[..., 4:], first)


def test_layers_without_rope_are_found():
    model = model_of("smollm3", MERGEABLE["smollm3"])
    assert [rotation.module is None for rotation in rotations(model)] == [False, True, False]


def test_interleaved_layouts_are_found():
    assert all(rotation.interleaved for rotation in rotations(tiny_model("glm")))
    assert not any(rotation.interleaved for rotation in rotations(tiny_model("gpt_neox")))


def test_layer_types_have_their_own_frequencies():
    model = model_of("gemma3_text", MERGEABLE["gemma3_text"])
    sliding, full, again = (rotation.frequencies for rotation in rotations(model))
    assert torch.equal(sliding, again)
    assert not torch.equal(sliding, full)
