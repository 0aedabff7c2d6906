"""Merged contexts, and the first token over them, are the same with our kernels and without."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import layers_of
from kvcag.cache.merge import PENALTY, RIDGE, Layout, Part, merge, query
from kvcag.engines.cuda.drift import solve
from kvcag.testing import byte_tokenizer, tiny_model
from tests.with_and_without_graphs import MIXED, engines

FAMILIES = {
    "llama": {},
    "llama, head size 64": {"head_dim": 64},
    "llama, head size 128": {"head_dim": 128},
    "llama, head size 80": {"head_dim": 80},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": MIXED},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "cohere": {},
    "gpt_neox": {},  # turns a part of each key: merged without our passes
    "phi": {},
}
TEXTS = ["Alice has a red bicycle. ", "Bob has a green car, and a dog. ", "The library opens at nine. "]
QUESTION = "What does Bob have?"


def merged(engine: HFEngine, strategy: str, repeat: int = 4, question: str = QUESTION, ratio: float = 0.2):
    memory = KVCacheMemory(engine, instruction="Answer.")
    ids = memory.add([memory.extract(text * repeat) for text in TEXTS])
    return memory.merge(ids, question, strategy=strategy, ratio=ratio)


def apart(got, right) -> float:
    pairs = zip(layers_of(got), layers_of(right), strict=True)
    return max(float((a - b).norm() / b.norm()) for kv, other in pairs for a, b in zip(kv, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["rotate", "query"])
def test_merged_contexts_are_the_same(family: str, strategy: str) -> None:
    fast, plain = engines(family.split(",")[0], **FAMILIES[family])
    got, right = (merged(each, strategy) for each in (fast, plain))
    assert got.report == right.report
    assert apart(got.cache, right.cache) < 1e-4
    if strategy == "query":
        assert apart(got.read.cache, right.read.cache) < 1e-4
        torch.testing.assert_close(got.read.logits, right.read.logits, rtol=1e-3, atol=1e-4)
    if family not in ("gpt_neox", "phi"):
        assert bool(fast._graphs._merging) == (strategy == "query"), repr(fast)


@pytest.mark.parametrize("repeat", [1, 12, 30, 90])
def test_whatever_the_length(repeat: int) -> None:
    fast, plain = engines("qwen3", max_position_embeddings=16384)
    got, right = (merged(each, "query", repeat) for each in (fast, plain))
    assert got.report == right.report
    assert apart(got.cache, right.cache) < 1e-4
    torch.testing.assert_close(got.read.logits, right.read.logits, rtol=1e-3, atol=1e-4)


def test_another_question_refines_the_context() -> None:
    answers = []
    for engine in engines("qwen3"):
        memory = KVCacheMemory(engine, instruction="Answer.")
        ids = memory.add([memory.extract(text * 4) for text in TEXTS])
        answers.append([str(memory.ask(asked, ids, max_new_tokens=16)) for asked in (QUESTION, "When does it open?")])
    assert answers[0] == answers[1]


def test_a_question_that_is_too_long_is_merged_for_all_the_same() -> None:
    fast, plain = engines("llama")
    got, right = (merged(each, "query", question="What? " * 100) for each in (fast, plain))
    assert apart(got.cache, right.cache) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_same_tokens_matter(dtype: torch.dtype) -> None:
    model = tiny_model("llama", head_dim=64, eos_token_id=None).to("cuda", dtype)
    fast, plain = (HFEngine(model, byte_tokenizer(), cuda_graphs=graphs) for graphs in (True, False))
    got, right = (merged(each, "query") for each in (fast, plain))
    assert apart(got.cache, right.cache) < 0.05


@pytest.mark.parametrize(("exact", "error"), [(True, 1e-4), (False, 3e-3)], ids=["to four digits", "to three"])
@pytest.mark.parametrize("size", [16, 48, 64, 128, 160, 256, 512])
def test_the_regression_is_solved(size: int, exact: bool, error: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 300, size, device="cuda") * torch.linspace(0.1, 3, size, device="cuda")
    products = x.mT @ torch.cat([x, 1e-3 * torch.randn(4, 300, size, device="cuda")], -1)
    scale = x.square().mean(1, keepdim=True).sqrt()
    gram, right = (products[..., :size] / (scale.mT * scale)).double(), (products[..., size:] / scale.mT).double()
    gram.diagonal(dim1=-2, dim2=-1).add_(PENALTY * 300)
    expected = RIDGE * torch.linalg.solve(gram, right) / scale.mT
    found = solve(products, torch.tensor([300], device="cuda"), exact=exact)
    assert float((found - expected).norm() / expected.norm()) < error


def test_scores_are_those_of_the_plain_pass() -> None:
    engine, _ = engines("qwen3")
    head = engine.template.encode("Answer.")
    parts = [Part(torch.tensor(head), engine.prefill(head)[0], 0, True)]
    for text in TEXTS:
        ids = engine.template.encode(text * 3)
        parts.append(Part(torch.tensor(ids), engine.encode_after(head, ids), len(head), False))
    tail = torch.tensor(engine.template.encode(QUESTION))
    with engine.exclusive() as model:
        layers = merge(model, parts, tail, strategy="rotate").layers
        length = layers[0][0].shape[-2]
        placed = type(layers)(
            tuple(torch.nn.functional.pad(t, (0, 0, 0, len(tail))) for t in kv)  # type: ignore[misc]
            for kv in layers
        )
        layout = Layout(torch.zeros(length, dtype=torch.long), torch.zeros(length), torch.zeros(length))
        right = query(model, [(k.clone(), v.clone()) for k, v in placed], layout, tail)
        got = engine.merge_passes.scores(placed, length, tail).cpu()
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
