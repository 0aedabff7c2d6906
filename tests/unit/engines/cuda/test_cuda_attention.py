"""The kernels against plain fp64 attention."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from kvcag.engines.cuda.attention import append, attend

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def expected(query, keys, values, positions, window=None, softcap=None, sinks=None):
    """One sequence: query `(heads, tokens, head_dim)`, keys `(kv_heads, capacity, head_dim)`."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (t.double().repeat_interleave(group, 0) for t in (keys, values))
    scores = query.double() @ keys.mT * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    key = torch.arange(keys.shape[1], device=DEVICE)
    seen = key <= positions[:, None]
    if window is not None:
        seen &= key > positions[:, None] - window
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(positions), 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return (weights @ torch.where(seen.any(0)[:, None], values, 0)).transpose(0, 1)


def check(lengths, tokens, kv_heads, group, head_dim, dtype, *, scattered=False, sinks=False, **how):
    """Sequences that hold `lengths` tokens get `tokens` new ones each; what lies behind them is not a number."""
    torch.manual_seed(0)
    heads, sequences = kv_heads * group, len(lengths)
    new = {"dtype": dtype, "device": DEVICE}
    caches, entries, positions = [], [], []
    for length in lengths:
        capacity = length + tokens + 5
        keys, values = (torch.randn(kv_heads, capacity, head_dim, **new) for _ in range(2))
        if not scattered:
            keys[:, length:], values[:, length:] = torch.nan, torch.nan
        caches.append((keys, values))
        entries.append([keys.data_ptr(), values.data_ptr(), capacity, 0, 0, 0, 0, 0])
        at = torch.randperm(length)[:tokens].sort().values if scattered else torch.arange(length, length + tokens)
        positions.append(at)
    table, at = torch.tensor(entries, device=DEVICE), torch.stack(positions).to(DEVICE)
    query = torch.randn(sequences, tokens, heads, head_dim, **new).transpose(1, 2)
    key = torch.randn(sequences, tokens, kv_heads, head_dim, **new).transpose(1, 2)
    value = torch.randn(sequences, kv_heads, tokens, head_dim, **new)
    append(key, value, table, at)
    for i, (keys, values) in enumerate(caches):
        assert torch.equal(keys[:, at[i]], key[i])
        assert torch.equal(values[:, at[i]], value[i])
    sink = torch.randn(heads, **new) if sinks else None
    got = attend(query, table, at, kv_heads, scaling=head_dim**-0.5, sinks=sink, **how)
    for i, (keys, values) in enumerate(caches):
        right = expected(query[i], keys.nan_to_num(), values.nan_to_num(), at[i], sinks=sink, **how)
        assert float((got[i].double() - right).norm() / right.norm()) < TOLERANCE[dtype]


CASES = [(37, 1), (1000, 1), (2135, 7), (333, 128), (0, 40)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("length", "tokens"), CASES)
def test_attention_over_a_cache(length, tokens, dtype):
    check([length], tokens, 2, 4, 64, dtype)


@pytest.mark.parametrize("head_dim", [8, 80, 96, 128, 256])
@pytest.mark.parametrize(("length", "tokens"), CASES[1:4])
def test_sizes_of_heads(length, tokens, head_dim):
    check([length], tokens, 2, 4, head_dim, torch.bfloat16)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8])
def test_any_number_of_heads_shares_a_kv_head(group):
    check([500], 33, 3, group, 64, torch.float32)


def test_sequences_of_different_lengths():
    check([1, 700, 64, 4000], 1, 8, 4, 128, torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 40, 200])
def test_a_window(tokens):
    check([300], tokens, 2, 2, 64, torch.float32, window=33)


def test_a_soft_cap():
    check([300], 20, 2, 2, 64, torch.float32, softcap=3.0)


@pytest.mark.parametrize("window", [None, 40])
def test_sinks(window):
    check([300], 20, 2, 2, 64, torch.float32, sinks=True, window=window)
    check([3000], 1, 2, 8, 64, torch.bfloat16, sinks=True, window=window)


def test_tokens_scattered_over_the_context():
    check([2000], 150, 2, 4, 128, torch.bfloat16, scattered=True)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_is_lent_is_read_where_it_lies(tokens, window, dtype):
    check_lent([(0, 300, 40), (0, 300, 41), (0, 250, 0), (30, 200, 50), (0, 0, 17), None], tokens, dtype, window=window)


@pytest.mark.parametrize("sequences", [8, 32, 64])
def test_many_sequences_over_one_context(sequences):
    check_lent([(0, 2000, i) for i in range(sequences)], 1, torch.bfloat16, kv_heads=8, group=4, head_dim=128)


def check_lent(held, tokens, dtype, *, kv_heads=2, group=3, head_dim=32, **how):
    """Sequences that hold `before` tokens of their own, `lent` tokens of one cache, and `behind` more of their own.

    None is no sequence: all of its tokens are at -1.
    """
    torch.manual_seed(0)
    new = {"dtype": dtype, "device": DEVICE}
    held, none = [each or (0, 0, 0) for each in held], [each is None for each in held]
    lent = torch.randn(2, kv_heads, max(length for _, length, _ in held) + 10, head_dim, **new)
    entries, at, whole, own = [], [], [], []
    for before, length, behind in held:
        mine = torch.randn(2, kv_heads, before + behind + tokens + 3, head_dim, **new)
        mine[:, :, before + behind :] = torch.nan
        own.append(mine)
        whole.append(torch.cat([mine[:, :, :before], lent[:, :, :length], mine[:, :, before : before + behind]], 2))
        borrowed = [lent[0].data_ptr(), lent[1].data_ptr(), lent.shape[2], before, length] if length else [0] * 5
        entries.append([mine[0].data_ptr(), mine[1].data_ptr(), mine.shape[2], *borrowed])
        at.append(torch.arange(before + length + behind, before + length + behind + tokens))
    at = [torch.full((tokens,), -1) if absent else one for absent, one in zip(none, at, strict=True)]
    table, positions = torch.tensor(entries, device=DEVICE), torch.stack(at).to(DEVICE)
    sequences, heads = len(held), kv_heads * group
    query = torch.randn(sequences, tokens, heads, head_dim, **new).transpose(1, 2)
    key = torch.randn(sequences, kv_heads, tokens, head_dim, **new)
    value = torch.randn(sequences, kv_heads, tokens, head_dim, **new)
    append(key, value, table, positions)
    got = attend(query, table, positions, kv_heads, scaling=head_dim**-0.5, **how)
    for i, absent in enumerate(none):
        if absent:
            assert bool(own[i].isnan().all())
            continue
        keys, values = (torch.cat([whole[i][n], new[i]], 1) for n, new in enumerate((key, value)))
        right = expected(query[i], keys, values, positions[i], **how)
        assert float((got[i].double() - right).norm() / right.norm()) < TOLERANCE[dtype]
