"""Every decoder family of transformers: a tiny random model of each, and what works with it.

`python -m tests.families` writes `docs/models.md`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvcag import HFEngine
from kvcag.cache.layers import generation_cache, kinds_of
from kvcag.cache.merge import Part, check_mergeable, merge
from kvcag.chat_template import Prompt
from kvcag.errors import UnsupportedModelError
from kvcag.testing import byte_tokenizer, tiny_model
from tests.merging import encode, error, ids, tokens_of

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

SMALLER: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 259,
    "is_decoder": True,
}
"""Settings that make a family's default model small, for the families that have them."""

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1}
DELTA = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 8,
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": DELTA,
    "bamba": {"attn_layer_indices": [2], **MAMBA},
    "codegen": {"rotary_dim": 4},
    "cohere2": WINDOWS,
    "falcon_h1": {"mamba_d_ssm": 64, **MAMBA},
    "gemma3_text": WINDOWS,
    "gemma3n_text": {**SHARED, "laurel_rank": 8, "altup_num_inputs": 2},
    "gemma4_text": SHARED,
    "gemma4_unified_text": SHARED,
    "gpt_neo": {"num_layers": 3, "attention_types": [[["global"], 3]]},
    "gpt_oss": WINDOWS,
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"], "mamba_expand": 2, **MAMBA},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2, "mamba_d_state": 8, "num_experts": 2},
    "kimi_linear": {**DELTA, "linear_num_heads": 4, "linear_head_dim": 16},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "olmo_hybrid": DELTA,
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "qwen3_5_moe_text": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "zamba2": {
        "layer_types": ["mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1],
        "mamba_ngroups": 1,
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beside."""


UNEXAMINED = frozenset(
    [
        "blt",
        "cohere_compass_text",
        "cpmant",
        "dbrx",
        "dots1",
        "dots3_note_text",
        "falcon",
        "git",
        "inkling2_loop_text",
        "inkling2_text",
        "longcat_flash",
        "musicgen",
        "musicgen_melody",
        "phi4_multimodal",
        "plbart",
        "prophetnet",
        "qwen4_exp_text",
        "reformer",
        "whisper",
        "xlm",
        "xlnet",
        "xlstm",
        "xmod",
        "zamba",
    ]
)
"""Model types of which no tiny model of text can be made by a configuration alone."""


@dataclass(frozen=True)
class Family:
    """What works with a model type of transformers.

    Attributes:
        exact: a prompt that begins like an earlier one is prefilled from where it differs, and answered as by the
            model without a cache.
        merges: a merge that recomputes everything is a full prefill, to 1e-5.
        why: why not.
    """

    model_type: str
    exact: bool
    merges: bool
    why: str = ""

    @property
    def row(self) -> str:
        """The family's row in the table of the page."""
        exact, merges = ("yes" if works else "no" for works in (self.exact, self.merges))
        return f"| `{self.model_type}` | {exact} | {merges} | {self.why} |"


def model_types() -> list[str]:
    """The decoders of text among transformers' causal language models, by their model type."""
    names = [
        name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if "text_config" not in CONFIG_MAPPING[name].sub_configs
    ]
    return sorted(set(names) - UNEXAMINED)


def model_of(model_type: str) -> PreTrainedModel:
    """A tiny random model."""
    config = CONFIG_MAPPING[model_type]
    known = {key: value for key, value in SMALLER.items() if hasattr(config, key)}
    if "kv_lora_rank" in known:
        known["num_key_value_heads"] = 4  # latents are made into one key for each head
    return tiny_model(model_type, **{**known, **OWN.get(model_type, {})})


def examine(model_type: str) -> Family:
    """Find out what works."""
    model = model_of(model_type)
    try:
        engine = HFEngine(model, byte_tokenizer())
        exact = reuses(engine)
    except UnsupportedModelError as refusal:
        return Family(model_type, exact=False, merges=False, why=reason(refusal))
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as failed:
        return Family(model_type, exact=False, merges=False, why=f"its forward pass fails ({type(failed).__name__})")
    if not exact:
        return Family(model_type, exact=False, merges=False, why="does not continue exactly from the cache of a prompt")
    try:
        return Family(model_type, exact, merged_error(engine) < 1e-5)
    except UnsupportedModelError as refusal:
        return Family(model_type, exact, merges=False, why=reason(refusal))


def reuses(engine: HFEngine) -> bool:
    """Whether a second prompt is prefilled from where it differs, and answered as by the model without a cache."""
    context, question = ids(40).tolist(), ids(9, seed=1).tolist()
    layers, _ = engine.prefill(context)
    logits = engine.forward(question, generation_cache([layers], len(question), kinds_of(engine.model)))
    chunks = list(engine.stream(Prompt(tuple(context), (), tuple(question)), engine.sampling(max_new_tokens=4)))
    answer = [token for chunk in chunks for token in chunk.token_ids]
    usage, said = chunks[-1].usage, [*context, *question]
    expected = next_logits(engine.model, said)
    for _ in answer:
        said.append(int(next_logits(engine.model, said).argmax()))
    near = float((logits[0] - expected).norm() / expected.norm()) < 1e-4
    return near and usage is not None and usage.cached_tokens == len(context) and said[-len(answer) :] == answer


@torch.no_grad()
def next_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """What the model itself thinks of each next token, without a cache: `(vocabulary,)`."""
    logits: torch.Tensor = model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]
    return logits


def merged_error(engine: HFEngine) -> float:
    """How far a merge that recomputes everything is from a full prefill, in logits; and in keys and values."""
    model, kinds = engine.model, kinds_of(engine.model)
    check_mergeable(model)
    head, tail, documents = ids(7), ids(9, seed=9), [ids(33, seed=1), ids(20, seed=2), ids(12, seed=4)]
    before, _ = engine.prefill(head.tolist())
    parts = [Part(head, before, 0, is_exact=True)]
    for document in documents:
        layers = engine.encode_after(head.tolist(), document.tolist())
        parts.append(Part(document, layers, len(head), len(parts) == 1, states_before=before.states))
    merged = merge(model, parts, tail, strategy="full").layers
    logits = engine.forward(tail.tolist(), generation_cache([merged], len(tail), kinds))[0]
    right = next_logits(model, [*tokens_of(parts).tolist(), *tail.tolist()])
    apart = float((logits - right).norm() / right.norm())
    return apart if kinds else max(apart, error(merged, encode(model, tokens_of(parts))))


def reason(refusal: UnsupportedModelError) -> str:
    """What a refusal says is wrong, without the class's name."""
    first = re.split(r"\. |: (?=its)", str(refusal))[0]
    return re.sub(r"^\S+?(?:'s)? (?=\S)", "", first)


INTRODUCTION = """# Which models

This page says which types of decoder models work with kvcag. To check your own model:

```sh
kvcag doctor --model MODEL
```

- **Exact**: documents, chats and agents reuse the longest prefix that was encoded before, and the answer is the
  model's own.
- **Merged**: kvcag can combine documents that were encoded one by one, in any order ([merging](merging.md)).

A checkpoint's `config.json` names its `model_type`. If text is only a part of a model, as in `gemma3`, `gemma4`,
`llama4` or `qwen3_5`, look for the type of the text model: `gemma3_text`, `gemma4_text`, `llama4_text`,
`qwen3_5_text`.

| name | model type |
| --- | --- |
| Qwen3.5, Qwen3.6 (dense; mixture of experts) | `qwen3_5_text`; `qwen3_5_moe_text` |
| Qwen3-Next | `qwen3_next` |
| LFM2, LFM2-MoE | `lfm2`, `lfm2_moe` |
| Granite 4 | `granitemoehybrid` |
| Gemma 3n; Gemma 4 E2B and E4B | `gemma3n_text`; `gemma4_text` |
| DeepSeek-V3 and R1, Kimi K2; GLM-4.7-Flash | `deepseek_v3`; `glm4_moe_lite` |
| Ministral 3 | `ministral3` |

`python -m tests.families` writes this page: it tries a tiny random model of each type in transformers {version}.
`tests/unit/test_every_family.py` checks the page. Types without a row need more than a configuration to make a small
model.

## Weights, adapters and devices

Keys and values have the dtype that the model computes in. The fingerprint covers the weights as they are stored,
including their scales. "Yes" means that exact reuse and merging work, on a CPU (`tests/unit/test_weights.py`).

| weights | works |
| --- | --- |
| torchao: int8, int4 and FP8, weight-only | yes |
| bitsandbytes: 8 and 4 bits | yes, and on a GPU |
| GPTQ, AWQ | not tried; packed weights in buffers are part of the fingerprint |
| FP8 in blocks (`FineGrainedFP8Config`) | not tried: transformers needs a GPU and a kernel from the hub |
| GGUF | yes if unpacked, as in `kvcag demo`; not tried packed, which needs a kernel from the hub |
| LoRA through peft | yes: active, switched, merged and unloaded |
| offloaded to memory or disk | yes, by a `device_map` or by `accelerate.cpu_offload` |
| layers on two GPUs | yes |

SmolLM2 with torchao's int8 weights was measured on 50 questions of five documents. The KL of its merges, divided by
the KL with float32 weights, is 1.05 with `rotate`, 1.09 with `query` at 10% and 0.99 at 20%
(`benchmarks/results/fidelity/int8-weights.json`). To repeat this, save a quantised checkpoint and pass it to
`benchmarks/fidelity.py` as `--model`.

## Recurrent layers

Models with recurrent layers are merged by `rotate` and `full` ([how](merging.md#recurrent-layers)). The other
strategies recompute single tokens, but a recurrent layer has no state for a token in the middle. Jamba, Mamba,
FalconMamba and Zaya have only exact reuse: in transformers {version} a pass over several tokens starts from zero and
ignores the earlier state, so kvcag cannot measure the effect of a document. These models read new text in a prompt
token by token.

## Every type

{exact} types work exactly, and {merged} of them can also be merged.

| model type | exact | merged | why not |
| --- | --- | --- | --- |
"""


def page(families: Sequence[Family]) -> str:
    """The page, with a row for each of the families."""
    exact, merged = (sum(works) for works in zip(*((each.exact, each.merges) for each in families), strict=True))
    head = INTRODUCTION.format(version=transformers.__version__, exact=exact, merged=merged)
    return head + "".join(f"{family.row}\n" for family in families)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page([examine(model_type) for model_type in model_types()]), encoding="utf-8")
