"""What the connector does without vLLM: spans, salts, ids of pieces, layouts of blocks, placing."""

from __future__ import annotations

import pytest
import torch

from kvcag.cache.attention import rotations
from kvcag.cache.layers import Layers, cut, layers_of
from kvcag.cache.merge import Part, merge
from kvcag.core import KVCacheItem, content_key
from kvcag.engines.hf import HFEngine
from kvcag.engines.vllm.blocks import (
    Asked,
    BlockLayout,
    CPUAttentionLayout,
    FlashAttentionLayout,
    Learned,
    Piece,
    candidates_of,
    merged_salt,
    placed,
    prefix_pieces,
    space_of,
)
from kvcag.errors import CacheMismatchError, InvalidInputError, UnsupportedModelError
from kvcag.testing import byte_tokenizer, tiny_model

# --- spans -------------------------------------------------------------------------------------------------------


def test_what_is_not_ours_is_left_to_others() -> None:
    assert Asked.of(None, 10) is None
    assert Asked.of({"do_remote_prefill": True}, 10) is None


def test_spans_are_read() -> None:
    asked = Asked.of({"kvcag": {"merge": [[0, 3], [3, 7]], "keep": [[1, 2], [5, 9]]}}, 9)
    assert asked is not None
    assert asked.merge == [(0, 3), (3, 7)]
    assert asked.keep == [(1, 2), (5, 9)]


@pytest.mark.parametrize(
    "said",
    [
        {"merge": [[1, 3]]},
        {"merge": [[0, 3], [4, 5]]},
        {"merge": [[0, 11]]},
        {"keep": [[3, 3]]},
        {"keep": [[4, 6], [5, 8]]},
        {"keep": [[-1, 2]]},
        {"keep": [[0, 1.5]]},
        {"keep": "all"},
        {"other": 1},
        [],
    ],
)
def test_a_span_that_is_empty_out_of_order_or_outside_is_refused(said: object) -> None:
    with pytest.raises(InvalidInputError, match="kvcag"):
        Asked.of({"kvcag": said}, 10)


def test_a_merged_context_has_a_salt_of_its_own_within_its_namespace() -> None:
    salt = merged_salt([1, 2, 3], "tenant")
    assert space_of(salt) == ("tenant", True)
    assert space_of("tenant") == ("tenant", False)
    assert space_of(merged_salt([1, 2, 3], None)) == space_of(merged_salt([1, 2], None)) == ("", True)
    assert space_of(None) == ("", False)
    assert len({salt, merged_salt([1, 3, 2], "tenant"), merged_salt([1, 2, 3], "other"), "tenant"}) == 4


def test_the_id_of_a_piece_says_all_that_stands_before_it() -> None:
    one, two = prefix_pieces("m", [1, 2, 3, 4, 5], 2), prefix_pieces("m", [1, 2, 9, 4], 2)
    assert [(piece.start, piece.stop) for piece in one] == [(0, 2), (2, 4)]
    assert one[0].id == two[0].id
    assert one[1].id != two[1].id
    assert prefix_pieces("other", [1, 2], 2)[0].id != one[0].id
    assert prefix_pieces("m", [9, 9, 3, 4], 2)[1].id != one[1].id
    assert prefix_pieces("m", [1], 2) == []


# --- layouts -----------------------------------------------------------------------------------------------------


def transposed(keys: torch.Tensor, values: torch.Tensor, block: torch.Tensor) -> None:
    """As the CPU attention keeps them under AVX-512: keys by component, values by token."""
    size, _, dim = keys.shape
    flat = block.view(-1)
    flat[: size * dim] = keys[:, 0].T.reshape(-1)
    flat[size * dim :] = values[:, 0].reshape(-1)


def layouts(dtype: torch.dtype) -> list[BlockLayout]:
    return [FlashAttentionLayout(), CPUAttentionLayout(transposed, 32, 64, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_written_into_blocks_is_read_again(which: int, dtype: torch.dtype) -> None:
    layout, cache = layouts(dtype)[which], torch.zeros(7, 3, 32, 128, dtype=dtype)
    kv = torch.randn(2, 1, 3, 96, 64).to(dtype)
    layout.write(cache, torch.tensor([5, 1, 2]), (kv[0], kv[1]))
    for got, wanted in zip(layout.read(cache, torch.tensor([5, 1, 2])), kv, strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(layout.read(cache, torch.tensor([2]))[0], kv[0][:, :, 64:])
    assert not cache[[0, 3, 4, 6]].any()


def test_flash_attention_has_a_tokens_key_and_value_side_by_side() -> None:
    cache, kv = torch.zeros(2, 3, 32, 128), torch.randn(2, 1, 3, 32, 64)
    FlashAttentionLayout().write(cache, torch.tensor([1]), (kv[0], kv[1]))
    keys, values = cache.transpose(1, 2).split(64, dim=-1)  # as its own forward reads them: (blocks, tokens, heads, …)
    assert torch.equal(keys[1].transpose(0, 1), kv[0, 0])
    assert torch.equal(values[1].transpose(0, 1), kv[1, 0])


def test_the_cpu_attention_gets_blocks_as_its_own_writer_makes_them() -> None:
    cache, kv = torch.zeros(2, 3, 32, 128), torch.randn(2, 1, 3, 32, 64)
    CPUAttentionLayout(transposed, 32, 64, torch.float32).write(cache, torch.tensor([1]), (kv[0], kv[1]))
    for head in range(3):
        block = torch.zeros(1, 1, 32, 128)
        transposed(kv[0, 0, head, :, None], kv[1, 0, head, :, None], block)
        assert torch.equal(cache[1, head], block[0, 0])


def test_a_cpu_attention_that_keeps_something_else_is_refused() -> None:
    def lossy(keys: torch.Tensor, values: torch.Tensor, block: torch.Tensor) -> None:
        transposed(keys, keys, block)

    with pytest.raises(UnsupportedModelError, match="block-size"):
        CPUAttentionLayout(lossy, 32, 64, torch.float32)


# --- placing -----------------------------------------------------------------------------------------------------

ENGINE = HFEngine(tiny_model(), byte_tokenizer())
HEAD, ONE, TWO = (
    ENGINE.template.encode("Answer.\n\n"),
    ENGINE.template.encode("The library opens at nine. " * 3),
    (ENGINE.template.encode("The museum is closed on Mondays, and on holidays. " * 3)),
)


def item_of(head_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> KVCacheItem:
    item = ENGINE.encode_item(head_ids, token_ids)
    assert isinstance(item, KVCacheItem)
    return item


def stored() -> dict[str, KVCacheItem]:
    items = [item_of((), HEAD), item_of(HEAD, ONE), item_of(HEAD, TWO)]
    return {item.id: item for item in items}


def pieces_of(*texts: tuple[int, ...]) -> tuple[list[Piece], list[int]]:
    pieces, ids = [], list[int]()
    for text in texts:
        start = len(ids)
        ids += text
        pieces.append(Piece(content_key(ENGINE.fingerprint.digest, text), start, len(ids)))
    return pieces, ids


def learned() -> Learned:
    whole, at = item_of((), HEAD + ONE + TWO), len(HEAD + ONE)
    alone = layers_of(item_of(HEAD, TWO).memory)
    [frequencies] = {id(each.module): each.frequencies for each in rotations(ENGINE.model)}.values()
    stood, stands = len(HEAD) + torch.arange(len(TWO)), at + torch.arange(len(TWO))
    return Learned.between(
        candidates_of(frequencies, interleaved=False), alone, stood, cut(layers_of(whole.memory), at), stands
    )


def joined(pieces: list[Piece], ids: list[int], start: int, stop: int, known: Learned) -> list[torch.Tensor]:
    found = list(placed(pieces, ids, start, stop, stored().get, ENGINE.fingerprint, lambda: known))
    assert found[0][0] == start
    assert found[-1][1] == stop
    return [torch.cat([layers[0][which] for _, _, layers in found], dim=-2) for which in (0, 1)]


def test_documents_are_placed_as_a_merge_places_them() -> None:
    known, (pieces, ids) = learned(), pieces_of(HEAD, TWO, ONE)
    items = [stored()[piece.id] for piece in pieces]
    parts = [
        Part(item.token_ids, layers_of(item.memory), item.base_position, is_exact=at < 2)
        for at, item in enumerate(items)
    ]
    with ENGINE.exclusive() as model:
        merged = merge(model, parts, torch.arange(0), strategy="rotate", usual_drift=lambda: known.drift)
    for got, wanted in zip(joined(pieces, ids, 0, len(ids), known), merged.layers[0], strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_part_of_a_context_is_the_same_as_within_the_whole() -> None:
    known, (pieces, ids) = learned(), pieces_of(HEAD, TWO, ONE)
    whole = joined(pieces, ids, 0, len(ids), known)
    start, stop = len(HEAD) + 5, len(ids) - 7  # borders of blocks within documents
    for got, wanted in zip(joined(pieces, ids, start, stop, known), whole, strict=True):
        torch.testing.assert_close(got, wanted[..., start:stop, :])


def test_an_item_of_other_tokens_or_of_another_model_or_none_is_not_placed() -> None:
    pieces, ids = pieces_of(HEAD, ONE)

    def place(get, ids: list[int] = ids, fingerprint=ENGINE.fingerprint) -> Layers:
        [_, (_, _, layers)] = placed(pieces, ids, 0, len(ids), get, fingerprint, learned)
        return layers

    assert place(stored().get)
    for broken in (
        lambda: place({}.get),
        lambda: place(stored().get, [*ids[:-1], ids[-1] + 1]),
        lambda: place(stored().get, ids, ENGINE.fingerprint.model_copy(update={"weights": "other"})),
    ):
        with pytest.raises(CacheMismatchError):
            broken()


def test_what_is_learned_is_kept_in_the_form_of_an_item() -> None:
    known = learned()
    [frequencies] = {id(each.module): each.frequencies for each in known.rotated if each.module}.values()
    candidates = [*{id(each): each for each in known.rotated}.values(), *candidates_of(frequencies, interleaved=True)]
    item = known.to_item("kv:learned:x", candidates, ENGINE.fingerprint)
    again = Learned.of_item(item, candidates)
    assert again.rotated == known.rotated
    assert all(torch.equal(a, b) for a, b in zip(again.drift.layers, known.drift.layers, strict=True))


def test_keys_that_no_known_rotation_moves_are_refused() -> None:
    layers = layers_of(item_of(HEAD, ONE).memory)
    there = Layers((torch.randn_like(keys), values) for keys, values in layers)
    at = torch.arange(len(ONE))
    with pytest.raises(UnsupportedModelError, match="layer 0"):
        Learned.between(candidates_of(torch.ones(4), interleaved=False), layers, at, there, at + 40)
