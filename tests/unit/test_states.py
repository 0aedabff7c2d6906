"""Recurrent layers: documents are maps of the state before them, composed in any order."""

from __future__ import annotations

from itertools import chain, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvcag import HFEngine, KVCacheMemory, calibrate
from kvcag.cache.layers import States, cache_argument, generation_cache, kinds_of, layers_of, states_of
from kvcag.cache.merge import Part, merge
from kvcag.cache.states import behind, check_affine, recording
from kvcag.errors import InvalidInputError, UnsupportedModelError
from kvcag.testing import byte_tokenizer, tiny_model
from tests.unit.test_recurrent import FAMILIES

MERGED = [name for name in FAMILIES if name not in ("jamba", "mamba")]
DOCUMENTS = ["The library opens at nine. " * 3, "It is in Harbour Street. " * 2, "Ask Mrs Whitmore for the key. " * 4]


@pytest.fixture(scope="module", params=MERGED)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return remembering(tiny_model(request.param, **FAMILIES[request.param]))


def remembering(model: PreTrainedModel) -> PreTrainedModel:
    """The model with states that last for some hundred tokens, and that its logits depend on, as trained models' do."""
    for mixer in mixers_of(model):
        for name, parameter in mixer.named_parameters():
            if name == "A_log":
                parameter.data.fill_(-5.0)
            elif parameter.dim() > 1:
                parameter.data.mul_(12.0)
    return model


def mixers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """What keeps states."""
    return [m for m in model.modules() if any(isinstance(child, torch.nn.Conv1d) for child in m.children())]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCAG_CACHE", str(tmp_path / "learned"))


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


@torch.no_grad()
def test_documents_compose_in_any_order_as_running_through_them_given_the_same_inputs(model: PreTrainedModel) -> None:
    """Layer by layer: all end alike, as the instruction does, so that convolutions see the same inputs."""
    kinds, width = kinds_of(model), model.config.hidden_size
    mixers = mixers_of(model)
    torch.manual_seed(1)
    ending = torch.randn(1, 4, width)
    head, *documents = (torch.cat([torch.randn(1, n, width), ending], dim=1) for n in (9, 33, 60, 97))

    def run(inputs: list[torch.Tensor]) -> tuple[States, States]:
        """The states after all but the last, and after the last, with its maps."""
        cache = generation_cache([], 1, kinds)
        cache.tokens = 1  # type: ignore[attr-defined]  # states are there
        for part in inputs[:-1]:
            for mixer in mixers:
                mixer(part, **cache_argument(mixer, cache))
        before = layers_of(cache).states
        assert before is not None
        before = before.restored()
        with recording(model, cache) as maps:
            for mixer in mixers:
                mixer(inputs[-1], **cache_argument(mixer, cache))
        after = layers_of(cache).states
        assert after is not None
        return before, States(kinds, after.tensors, maps(inputs[-1].shape[1]))

    alone = [run([head, document]) for document in documents]
    for order in permutations(range(3)):
        states = alone[0][0]
        for index in order:
            before, document = alone[index]
            states = behind(document, states, before, documents[index].shape[1])
        _, through = run([head, *(documents[index] for index in order)])
        for found, right in zip(states.flat, States(kinds, through.tensors).flat, strict=True):
            assert error(found, right) < 1e-5


def parts_of(engine: HFEngine, head: list[int], documents: list[list[int]]) -> list[Part]:
    before, _ = engine.prefill(head)
    parts = [Part(torch.tensor(head), before, 0, is_exact=True)]
    for index, ids in enumerate(documents):
        layers = engine.encode_after(head, ids)
        parts.append(Part(torch.tensor(ids), layers, len(head), index == 0, states_before=before.states))
    return parts


@torch.no_grad()
def test_full_equals_a_full_prefill_and_rotate_is_nearer_to_it_with_the_earlier_documents_states(
    model: PreTrainedModel,
) -> None:
    """Nearer on the mean of three orders: what the attention layers' keys drift by is in both."""
    engine, kinds = HFEngine(model, byte_tokenizer()), kinds_of(model)
    head, tail = list(range(97, 117)), list(range(100, 110))
    rotated = forgetful = 0.0
    for texts in list(permutations(DOCUMENTS))[::2]:
        documents = [list(text.encode()) for text in texts]
        parts = parts_of(engine, head, documents)
        right = engine.forward([*head, *chain(*documents), *tail], generation_cache([], 9, kinds))

        def distance(layers: Any, right: torch.Tensor = right) -> float:
            return error(engine.forward(tail, generation_cache([layers], 9, kinds)), right)

        assert distance(merge(model, parts, torch.tensor(tail), strategy="full").layers) < 1e-5
        merged = merge(model, parts, torch.tensor(tail), strategy="rotate")
        rotated += distance(merged.layers)
        last = states_of(parts[-1].layers or ())
        assert last is not None
        assert last.is_map
        merged.layers.states = last  # type: ignore[attr-defined]
        forgetful += distance(merged.layers)
    if any(known is not None for known in last.maps):
        assert rotated < forgetful
    else:  # convolutions look back less far than the last document is long
        assert rotated == forgetful


def test_a_merged_answer_reads_the_question_alone_from_a_store_too(model: PreTrainedModel, tmp_path: Path) -> None:
    KVCacheMemory(HFEngine(model, byte_tokenizer()), tmp_path).add(DOCUMENTS)
    fresh = KVCacheMemory(HFEngine(model, byte_tokenizer()), tmp_path)
    answer = fresh.ask("When?", strategy="rotate", max_new_tokens=4)
    assert answer.report is not None
    assert answer.report.mode == "merged"
    head = answer.report.context_tokens - sum(len(item.token_ids) for item in fresh.get_all())
    assert answer.report.encoded_tokens == max(head, 0)
    full = fresh.ask("When?", strategy="full", max_new_tokens=4)
    assert full.text == fresh.ask("When?", strategy="exact", max_new_tokens=4).text


def test_a_token_in_the_middle_cannot_be_computed_again(model: PreTrainedModel) -> None:
    memory = KVCacheMemory(HFEngine(model, byte_tokenizer()))
    memory.add(DOCUMENTS)
    with pytest.raises(UnsupportedModelError, match="no state for a token in the middle"):
        memory.ask("When?", strategy="query")


def test_auto_merges_only_where_it_was_measured(model: PreTrainedModel) -> None:
    memory = KVCacheMemory(HFEngine(model, byte_tokenizer()))
    memory.add(DOCUMENTS)
    first = memory.ask("When?", max_new_tokens=1).report
    assert first is not None
    assert first.is_exact
    assert "not calibrated" in first.reason
    engine = HFEngine(model, byte_tokenizer())
    verdicts = calibrate(engine, DOCUMENTS, probes=1, documents_per_probe=3, tokens=4).verdicts
    assert {verdict.strategy for verdict in verdicts} == {"rotate", "full"}
    assert next(verdict.kl for verdict in verdicts if verdict.strategy == "full") < 1e-6


@pytest.mark.parametrize("family", ["jamba", "mamba"])
def test_layers_that_ignore_their_state_are_not_merged_and_go_on_token_by_token(family: str) -> None:
    model = tiny_model(family, **FAMILIES[family])
    with pytest.raises(UnsupportedModelError, match="ignore the state"):
        check_affine(model)
    engine = HFEngine(model, byte_tokenizer())
    memory = KVCacheMemory(engine)
    memory.add(DOCUMENTS)
    report = memory.ask("When?", max_new_tokens=1).report
    assert report is not None
    assert report.is_exact


def test_a_document_without_maps_is_refused() -> None:
    model = tiny_model("qwen3_5_text", **FAMILIES["qwen3_5_text"])
    engine = HFEngine(model, byte_tokenizer())
    parts = parts_of(engine, [97, 98], [[99, 100], [101, 102]])
    parts[-1].layers.states = None  # type: ignore[union-attr]
    with pytest.raises(InvalidInputError, match="no states"):
        merge(model, parts, torch.tensor([97]), strategy="rotate")
