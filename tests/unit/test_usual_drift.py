"""Where nothing is recomputed, documents get the drift that documents usually have in this model."""

import os

import pytest
import torch

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.attention import rotations
from kvcag.cache.layers import contiguous_copy, layers_of
from kvcag.cache.merge import UsualDrift, merge
from kvcag.calibration import PASSAGES, usual_drift_of
from kvcag.errors import CacheWarning
from kvcag.testing import byte_tokenizer, tiny_model
from tests.merging import encode, equal, ids, parts_of

MODEL = tiny_model("llama")
HEAD, DOCUMENTS, TAIL = ids(5), [ids(9, seed=1), ids(14, seed=2), ids(20, seed=3)], ids(6, seed=99)


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVCAG_CACHE", str(tmp_path))
    return tmp_path


def engine(**config) -> HFEngine:
    return HFEngine(tiny_model(**config), byte_tokenizer())


def learned_from_these_documents() -> UsualDrift:
    """Of one token a document, so that the mean over tokens is that token's own drift."""
    parts = parts_of(MODEL, HEAD, DOCUMENTS)
    alone = parts[2].layers
    together = encode(MODEL, torch.cat([HEAD, *DOCUMENTS[:2]]))
    at = len(HEAD) + len(DOCUMENTS[0])
    n = len(DOCUMENTS[1])
    return UsualDrift.between(
        rotations(MODEL),
        alone,
        len(HEAD) + torch.arange(n),
        [(k[..., at:, :], v[..., at:, :]) for k, v in together],
        at + torch.arange(n),
    )


def test_drift_is_found_whatever_the_positions():
    """A document that did not change, but moved, has none."""
    alone = parts_of(MODEL, HEAD, DOCUMENTS)[1].layers
    moved = merge(MODEL, parts_of(MODEL, HEAD, [DOCUMENTS[2], DOCUMENTS[0]]), TAIL, strategy="rotate").layers
    at, n = len(HEAD) + len(DOCUMENTS[2]), len(DOCUMENTS[0])
    there = [(k[..., at:, :], v[..., at:, :]) for k, v in moved]
    drift = UsualDrift.between(rotations(MODEL), alone, len(HEAD) + torch.arange(n), there, at + torch.arange(n))
    assert all(layer.abs().max() < 1e-5 for layer in drift.layers)


def test_it_is_given_to_what_is_not_exact_and_to_nothing_else():
    parts = parts_of(MODEL, HEAD, DOCUMENTS)
    plain = merge(MODEL, parts, TAIL, strategy="rotate").layers
    given = merge(MODEL, parts, TAIL, strategy="rotate", usual_drift=learned_from_these_documents).layers
    exact = len(HEAD) + len(DOCUMENTS[0])
    for index, (before, after) in enumerate(zip(plain, given, strict=True)):
        for was, now in zip(before, after, strict=True):
            assert torch.equal(was[..., :exact, :], now[..., :exact, :])
            if index:  # what the first layer makes of a token does not depend on the others
                assert (was[..., exact:, :] != now[..., exact:, :]).any(-1).all()


def test_learned_from_a_document_it_brings_that_document_nearer():
    parts = parts_of(MODEL, HEAD, DOCUMENTS[:2])
    right = encode(MODEL, torch.cat([HEAD, *DOCUMENTS[:2]]))
    plain = merge(MODEL, parts, TAIL, strategy="rotate").layers
    given = merge(MODEL, parts, TAIL, strategy="rotate", usual_drift=learned_from_these_documents).layers
    for index in (1, 2):
        for which in (0, 1):
            was, now = ((layers[index][which] - right[index][which]).norm() for layers in (plain, given))
            assert now < was


@pytest.mark.parametrize(("strategy", "ratio"), [("query", 0.5), ("anchor", 0.2), ("full", 0.0)])
def test_recomputed_tokens_show_their_own(strategy, ratio):
    parts = parts_of(MODEL, HEAD, DOCUMENTS)

    def not_this() -> UsualDrift:
        raise AssertionError

    merge(MODEL, parts, TAIL, strategy=strategy, ratio=ratio, usual_drift=not_this)


def test_stored_parts_do_not_change():
    parts = parts_of(MODEL, HEAD, DOCUMENTS)
    before = [contiguous_copy(part.layers) for part in parts]
    merge(MODEL, parts, TAIL, strategy="rotate", usual_drift=learned_from_these_documents)
    assert all(equal(part.layers, was) for part, was in zip(parts, before, strict=True))


def test_an_engine_learns_it_once_and_keeps_it(cache_folder):
    first = usual_drift_of(engine())
    assert first is not None
    (file,) = (cache_folder / "drift").iterdir()
    made = file.stat().st_mtime_ns
    again = usual_drift_of(engine())
    assert file.stat().st_mtime_ns == made
    assert all(torch.equal(a, b) for a, b in zip(first.layers, again.layers, strict=True))
    assert usual_drift_of(engine(seed=1)) is not None  # another model, another file
    assert len(list((cache_folder / "drift").iterdir())) == 2


def flip(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 0x7F]) + data[-8:]


@pytest.mark.parametrize("damage", [lambda data: data[:-40], flip])
def test_a_file_that_was_cut_or_changed_is_learned_again(cache_folder, damage):
    """Two flipped bytes moved merged keys by 1,146 in silence."""
    right = usual_drift_of(engine())
    (file,) = (cache_folder / "drift").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert all(torch.equal(a, b) for a, b in zip(right.layers, usual_drift_of(engine()).layers, strict=True))


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_what_is_learned_is_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("KVCAG_CACHE", str(tmp_path / "cache"))
    usual_drift_of(engine())
    for path in (tmp_path / "cache").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX")
def test_a_planted_link_overwrites_no_file(cache_folder, monkeypatch):
    """The temporary file had a name that another program could guess, and a link there was followed."""
    victim = cache_folder / "victim"
    victim.write_text("mine")
    usual_drift_of(engine())
    (file,) = (cache_folder / "drift").iterdir()
    for planted in (file, file.with_suffix(f".{os.getpid()}.tmp")):
        planted.unlink(missing_ok=True)
        planted.symlink_to(victim)
    victim.write_text("mine")
    usual_drift_of(engine())
    assert victim.read_text() == "mine"


@pytest.mark.skipif(os.name != "posix", reason="a file where a folder is wanted")
def test_where_it_cannot_be_kept_it_is_learned_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVCAG_CACHE", str(tmp_path / "file"))
    with pytest.warns(CacheWarning, match="KVCAG_CACHE"):
        assert usual_drift_of(engine()) is not None


def test_a_short_context_learns_from_fewer_passages_and_a_very_short_one_not_at_all(cache_folder):
    assert usual_drift_of(engine(max_position_embeddings=400)) is not None
    assert usual_drift_of(engine(max_position_embeddings=130)) is None


def test_rotate_through_the_memory_uses_it_and_query_does_not(cache_folder):
    memory = KVCacheMemory(engine())
    items = [memory.extract(text) for text in ("the first document\n", "and another one\n")]
    memory.add(items)
    names = [item.id for item in items]
    memory.merge(names, "what?", strategy="query", ratio=0.5)
    memory.merge(names[:1], "what?", strategy="rotate")
    assert not (cache_folder / "drift").exists()
    merged = memory.merge(names, "what?", strategy="rotate")
    assert (cache_folder / "drift").exists()
    zero = memory.merge(names, "what?", strategy="query", ratio=0)
    assert equal(layers_of(merged.cache), layers_of(zero.cache))


def test_passages_are_about_as_long_as_is_read_of_them():
    assert len(PASSAGES) == 10
    assert all(90 <= len(text.split()) <= 130 for text in PASSAGES)


def test_without_a_kernel_the_layers_drifts_are_not_joined(monkeypatch):
    """Regression: joining them failed for models whose layers have heads of different sizes, such as Gemma 4."""
    asked = []
    monkeypatch.setattr(UsualDrift, "stacked", lambda self, device: asked.append(device))
    merge(MODEL, parts_of(MODEL, HEAD, DOCUMENTS), TAIL, strategy="rotate", usual_drift=learned_from_these_documents)
    assert not asked
