"""A prefix cache of recent contexts, so that the longest known prefix of a prompt is not encoded again.

It is a radix tree over token ids whose nodes have keys and values, so that contexts with a common prefix share its
tensors (the idea is SGLang's RadixAttention, Zheng et al. 2024). A match may end after any token. For a model with
recurrent layers, it ends where a context was inserted, because only there the layers' states are known.

Merged contexts, and what was generated over them, are in separate trees, so that an approximation is never found in
place of an exact prefix.

`runs` finds tokens of a prompt that recent contexts have at other positions: messages that remain when a history is
trimmed, summarised or cleared in the middle.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from kvcag.cache.layers import LayerKV, Layers, contiguous_copy, cut, nbytes, states_of
from kvcag.concurrency import holding


@dataclass(slots=True, eq=False)
class _Node:
    """A node of the tree: the tokens from its parent to the next branch, and their keys and values."""

    token_ids: np.ndarray
    layers: Layers
    parent: _Node | None
    start: int = 0  # the position of its first token
    children: dict[int, _Node] = field(default_factory=dict)
    used: int = 0
    is_exact: bool = True
    openings: dict[bytes, list[int]] | None = None  # see `PrefixCache._openings_of`; None: not computed yet

    @property
    def nbytes(self) -> int:
        return nbytes(self.layers)

    def shares(self, other: _Node) -> bool:
        """Whether both nodes share memory, as the halves of a split node do."""
        return _memory(self) is not None and _memory(self) == _memory(other)


def _memory(node: _Node) -> int | None:
    """Return the address of a node's memory; None for a model without attention layers."""
    if not len(node.layers):
        return None
    return node.layers[0][0].untyped_storage().data_ptr()


_SHORTEST_RUN = 32
"""The least length of a run that `PrefixCache.runs` finds."""

_TRIED = 64
"""The most places with the same first 32 tokens that are compared, since a chat may repeat a text many times."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of a prompt that are also consecutive in a recent context.

    Attributes:
        start: the position of the first token in the prompt.
        stood: the position of the first token in the recent context.
        length: the number of tokens.
        pieces: their keys and values at the positions of the recent context, in consecutive pieces, only to be read.
    """

    start: int
    stood: int
    length: int
    pieces: list[Layers]

    @property
    def end(self) -> int:
        """The position after the last token in the prompt."""
        return self.start + self.length


class PrefixCache:
    """Finds the longest cached prefix of a prompt.

    Inserted tensors are copied, and returned tensors are only to be read, so generations do not affect each other. When
    the budget is full, the least recently used leaf is evicted, a merged one before an exact one of the same age. Only
    namespaces with more than an equal share of the budget lose leaves. Safe to use from several threads.

    Args:
        max_bytes: the budget in bytes; 0 caches nothing.
        turn_ids: the tokens at which a run may begin: the chat template's control tokens.
        recurrent: the model has recurrent layers.
    """

    def __init__(self, max_bytes: int, turn_ids: Collection[int] = (), *, recurrent: bool = False) -> None:
        self.max_bytes = max_bytes
        self._turn_ids = np.asarray(sorted(turn_ids), dtype=np.int64)
        self._recurrent = recurrent
        self.nbytes = 0
        self._held: dict[str, int] = {}  # bytes of each namespace that has some
        self._roots: dict[tuple[str, bool], _Node] = {}
        self._clock = 0
        self._epochs: dict[str, int] = {}
        self._cleared = 0
        self._lock = threading.Lock()

    def match(self, token_ids: Sequence[int], namespace: str = "", *, merged: bool = False) -> tuple[int, list[Layers]]:
        """Return the length of the longest cached prefix, and its keys and values in pieces, only to be read.

        Args:
            token_ids: the tokens of a prompt.
            namespace: the namespace of the contexts.
            merged: look among the merged contexts instead of the exact ones.
        """
        wanted = np.asarray(token_ids, dtype=np.int64)
        with self._lock:
            self._clock += 1
            matched, pieces = 0, list[Layers]()
            for node, shared in self._resumable(self._path(wanted, namespace, merged)):
                node.used = self._clock
                pieces.append(node.layers if shared == len(node.token_ids) else cut(node.layers, 0, shared))
                matched += shared
            return matched, pieces

    def _resumable(self, path: list[tuple[_Node, int]]) -> list[tuple[_Node, int]]:
        """Shorten a path to where the model can continue: with recurrent layers, to the last node with states."""
        while self._recurrent and path:
            node, shared = path[-1]
            if shared == len(node.token_ids) and states_of(node.layers) is not None:
                break
            path = path[:-1]
        return path

    def runs(self, token_ids: Sequence[int], start: int, namespace: str = "") -> list[Run]:
        """Return the longest runs of a prompt that are in recent contexts, exact or merged, without overlaps, in order.

        A run begins where a turn begins or ends, and is at least 32 tokens long.

        Args:
            token_ids: the tokens of the prompt.
            start: the first position of the prompt to look at.
            namespace: the namespace of the contexts.
        """
        wanted = np.asarray(token_ids, dtype=np.int64)
        openings = self._openings(wanted, max(0, start - _SHORTEST_RUN))  # the turn around `start` counts too
        sought = {opening for opening, _ in openings}
        places: dict[bytes, list[tuple[_Node, int]]] = {}
        found: list[Run] = []
        with self._lock:
            self._clock += 1
            for node in [node for merged in (False, True) for node in _below(self._roots.get((namespace, merged)))]:
                known = self._openings_of(node)
                for opening in sought & known.keys():
                    places.setdefault(opening, []).extend((node, stood) for stood in known[opening])
            for opening, at in openings:
                if opening not in places or (found and at < found[-1].end):
                    continue
                begin = max(at, start)
                tried = places[opening][:_TRIED]
                runs = [self._run(node, stood + begin - at, wanted, begin) for node, stood in tried]
                longest = max(runs, key=lambda run: run.length)  # of equal lengths the first, which is exact
                if longest.length >= _SHORTEST_RUN:
                    found.append(longest)
        return found

    def insert(
        self,
        token_ids: Sequence[int],
        layers: Sequence[LayerKV] | Callable[[int], Sequence[LayerKV]],
        namespace: str = "",
        *,
        merged: bool = False,
        epoch: int | None = None,
    ) -> None:
        """Cache a context. Only tokens that are not cached yet are copied.

        Args:
            token_ids: the tokens of the context.
            layers: keys and values of all tokens, `(1, kv_heads, seq_len, head_dim)` per layer; or a function that
                returns those from a position on.
            namespace: the namespace of the context.
            merged: the context is approximate, or was generated over an approximate one.
            epoch: the value of `epoch` when the work began. If the namespace was cleared since, nothing is cached.
        """
        wanted = np.asarray(token_ids, dtype=np.int64)
        if not len(wanted):
            return
        with self._lock:
            if epoch is not None and epoch != self._epochs.get(namespace, 0) + self._cleared:
                return
            path = self._path(wanted, namespace, merged)
            matched = sum(shared for _, shared in path)
            new = layers(matched) if callable(layers) else cut(layers, matched)
            states, missing = nbytes(Layers((), states_of(new))), len(wanted) - matched
            if missing and (nbytes(new) - states) * len(wanted) / missing + states > self.max_bytes:
                return
            self._clock += 1
            node = self._roots.setdefault((namespace, merged), _Node(wanted[:0], Layers(), None, is_exact=not merged))
            for reached, shared in path:
                node = reached if shared == len(reached.token_ids) else self._split(reached, shared)
                node.used = self._clock
            if matched < len(wanted):
                kept = contiguous_copy(new)
                leaf = _Node(wanted[matched:].copy(), kept, node, matched, used=self._clock, is_exact=not merged)
                node.children[int(wanted[matched])] = leaf
                self._count(namespace, leaf.nbytes)
            elif self._recurrent and states_of(node.layers) is None:  # the node was made by a split
                node.layers.states = contiguous_copy(Layers((), states_of(new))).states
                self._count(namespace, nbytes(Layers((), node.layers.states)))
            self._evict()

    def epoch(self, namespace: str = "") -> int:
        """Return how often a namespace was cleared. Work that began before must not insert its result."""
        with self._lock:
            return self._epochs.get(namespace, 0) + self._cleared

    def replace_merged(self, token_ids: Sequence[int], layers: Sequence[LayerKV], namespace: str = "") -> None:
        """Replace the keys and values of a merged context with better ones. Tokens after the context do not change.

        Does nothing if the context is no longer cached.
        """
        wanted = np.asarray(token_ids, dtype=np.int64)
        with self._lock:
            path = self._path(wanted, namespace, merged=True)
            if sum(shared for _, shared in path) < len(wanted):
                return
            start = 0
            for reached, shared in path:
                node = reached if shared == len(reached.token_ids) else self._split(reached, shared)
                old = _memory(node)
                node.layers = contiguous_copy(cut(layers, start, start + shared))
                for below in _below(node):  # another half of a split node would keep the whole old memory
                    if len(below.layers) and _memory(below) == old:
                        below.layers = contiguous_copy(below.layers)
                start += shared

    def clear(self, namespace: str | None = None) -> None:
        """Drop all contexts of a namespace; None means all namespaces."""
        with self._lock:
            if namespace is None:
                self._cleared += 1
            else:
                self._epochs[namespace] = self._epochs.get(namespace, 0) + 1
            for root in [root for root in self._roots if namespace is None or root[0] == namespace]:
                self._count(root[0], -sum(node.nbytes for node in _below(self._roots.pop(root))))

    def _path(self, wanted: np.ndarray, namespace: str, merged: bool) -> list[tuple[_Node, int]]:
        """Return the nodes along `wanted`, each with its number of equal tokens. Only the last may differ in some."""
        path: list[tuple[_Node, int]] = []
        node, at = self._roots.get((namespace, merged)), 0
        while node is not None and at < len(wanted):
            node = node.children.get(int(wanted[at]))
            if node is None:
                break
            shared = agreeing(node.token_ids, wanted[at:])
            path.append((node, shared))
            if shared < len(node.token_ids):
                break
            at += shared
        return path

    def _openings(self, token_ids: np.ndarray, start: int = 0) -> list[tuple[bytes, int]]:
        """Return the 32 tokens from each control token on, as bytes, and the position of the first."""
        last = max(start, len(token_ids) - _SHORTEST_RUN + 1)
        places = np.flatnonzero(np.isin(token_ids[start:last], self._turn_ids)) + start
        return [(token_ids[at : at + _SHORTEST_RUN].tobytes(), int(at)) for at in places]

    def _openings_of(self, node: _Node) -> dict[bytes, list[int]]:
        """Return the openings that end in a node, with their positions. They may begin in nodes above it."""
        if node.openings is None:
            token_ids, above = node.token_ids, node.parent
            while above is not None and (missing := len(node.token_ids) + _SHORTEST_RUN - 1 - len(token_ids)) > 0:
                token_ids, above = np.concatenate([above.token_ids[-missing:], token_ids]), above.parent
            first = node.start + len(node.token_ids) - len(token_ids)
            node.openings = {}
            for opening, at in self._openings(token_ids):
                node.openings.setdefault(opening, []).append(first + at)
        return node.openings

    def _run(self, node: _Node, stood: int, wanted: np.ndarray, start: int) -> Run:
        """Return the run from position `start` of `wanted` and from position `stood` of the path through `node`."""
        route = [node]
        while route[0].start > stood:
            above = route[0].parent
            assert above is not None
            route.insert(0, above)
        end, offset, pieces = start, stood - route[0].start, []
        while route and end < len(wanted):
            node, *route = route
            node.used = self._clock
            shared = agreeing(node.token_ids[offset:], wanted[end:])
            pieces.append(cut(node.layers, offset, offset + shared))
            end += shared
            if offset + shared < len(node.token_ids):
                break
            if not route and end < len(wanted) and (below := node.children.get(int(wanted[end]))) is not None:
                route = [below]
            offset = 0
        return Run(start, stood, end - start, pieces)

    def _split(self, node: _Node, at: int) -> _Node:
        """Split a node after its first `at` tokens, and return the new upper node.

        Both nodes are views of the same memory, so that a question over a long corpus does not wait for a copy.
        """
        assert node.parent is not None
        kept = cut(node.layers, 0, at)
        upper = _Node(node.token_ids[:at], kept, node.parent, node.start, used=node.used, is_exact=node.is_exact)
        node.parent.children[int(upper.token_ids[0])] = upper
        node.token_ids, node.layers = node.token_ids[at:], cut(node.layers, at)
        node.parent, node.start, node.openings = upper, node.start + at, None
        upper.children[int(node.token_ids[0])] = node
        return upper

    def _count(self, namespace: str, nbytes: int) -> None:
        self.nbytes += nbytes
        self._held[namespace] = self._held.get(namespace, 0) + nbytes
        if not self._held[namespace]:
            del self._held[namespace]

    def _evict(self) -> None:
        while self.nbytes > self.max_bytes:
            share = self.max_bytes / len(self._held)
            leaves = ((whose, leaf) for whose, leaf in self._leaves() if self._held[whose] > share)
            whose, oldest = min(leaves, key=lambda each: (each[1].used, each[1].is_exact))
            above = oldest.parent
            assert above is not None
            del above.children[int(oldest.token_ids[0])]
            self._count(whose, -oldest.nbytes)
            while above is not None and above.shares(oldest):  # its memory is free only when no other node shares it
                above.layers = contiguous_copy(above.layers)
                above = above.parent

    def _leaves(self) -> Iterator[tuple[str, _Node]]:
        """The ends of contexts, each with its namespace."""
        nodes = ((whose, node) for (whose, _), root in self._roots.items() for node in _below(root))
        return ((whose, node) for whose, node in nodes if not node.children and node.parent is not None)


def agreeing(left: np.ndarray, right: np.ndarray) -> int:
    """Return the length of the common prefix of two token arrays."""
    length = min(len(left), len(right))
    differs = np.flatnonzero(left[:length] != right[:length])
    return int(differs[0]) if len(differs) else length


def _below(root: _Node | None) -> Iterator[_Node]:
    """Yield a node and all nodes below it."""
    stack = [root] if root else []
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


_WORTH_WAITING = 32
"""A prefill waits for another one that computes at least this many of its tokens, and half of the other's tokens."""


@dataclass(eq=False)
class _Prefill:
    token_ids: np.ndarray
    namespace: str
    running: threading.Lock = field(default_factory=threading.Lock)


class InFlight:
    """The running prefills of one engine. A prefill may wait for another one that computes tokens it needs."""

    def __init__(self) -> None:
        self._prefills: list[_Prefill] = []
        self._lock = threading.Lock()

    @contextmanager
    def prefill(
        self,
        token_ids: Sequence[int],
        namespace: str,
        known: Callable[[Sequence[int], str], int],
        *,
        background: bool = False,
    ) -> Iterator[None]:
        """Wait for earlier prefills that compute uncached tokens of this one, then register this prefill.

        Args:
            token_ids: the tokens of the prompt.
            namespace: the namespace of the prompt. Prefills of other namespaces do not matter.
            known: returns the length of the longest cached prefix.
            background: other prefills do not wait for this one.

        Raises:
            Cancelled: the reader left while this thread waited.
        """
        mine = _Prefill(np.asarray(token_ids, dtype=np.int64), namespace)
        mine.running.acquire()
        while (other := self._worth_waiting_for(mine, known(token_ids, namespace), not background)) is not None:
            with holding(other.running):
                pass
        try:
            yield
        finally:
            with self._lock:
                if mine in self._prefills:
                    self._prefills.remove(mine)
            mine.running.release()

    def _worth_waiting_for(self, mine: _Prefill, known: int, register: bool) -> _Prefill | None:
        """Return an earlier prefill to wait for. If no prefill is worth it, register `mine`, and return None."""
        with self._lock:
            for other in self._prefills:
                saved = agreeing(other.token_ids, mine.token_ids) - known if other.namespace == mine.namespace else 0
                if saved >= max(_WORTH_WAITING, (len(other.token_ids) - known) // 2):
                    return other
            if register:
                self._prefills.append(mine)
            return None
