"""Measurements per model: what each merge strategy costs in accuracy and time, and the drift of documents.

The drift of a document is how its keys and values change when other documents stand before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from kvcag.cache.attention import rotations
from kvcag.cache.layers import (
    LayerKV,
    Layers,
    concat,
    cut,
    generation_cache,
    kinds_of,
    layers_of,
    run,
    states_of,
)
from kvcag.cache.merge import STATE_STRATEGIES, DriftSums, Part, UsualDrift, merge
from kvcag.chat_template import as_messages
from kvcag.core import MergeStrategy, ids_digest
from kvcag.engines.base import Engine
from kvcag.engines.hf import HFEngine
from kvcag.errors import CacheWarning, InvalidInputError, StoreError, StoreUnavailableError
from kvcag.stores.files import atomic_write, checksum, make_private, unavailable

Candidate: TypeAlias = tuple[MergeStrategy, float]

CANDIDATES: tuple[Candidate, ...] = (
    ("rotate", 0.0),
    ("query", 0.05),
    ("query", 0.1),
    ("query", 0.2),
    ("query", 0.4),
    ("full", 1.0),
)

Progress: TypeAlias = Callable[[int, int], None]
"""Called as `progress(done, total)`."""


class Verdict(BaseModel):
    """The result of one strategy, averaged over the probes.

    Attributes:
        strategy: the merge strategy.
        ratio: the recompute ratio, in [0, 1].
        kl: KL(full prefill ‖ merged), in nats per token, over the greedy tokens of the full prefill.
        agreement: the share of those tokens at which both predict the same next token.
        cost: the time to first token, divided by that of a full prefill of the same tokens.
    """

    model_config = ConfigDict(frozen=True)

    strategy: MergeStrategy
    ratio: float
    kl: float
    agreement: float
    cost: float


class Calibration(BaseModel):
    """The verdicts on one model, from probes made of the user's documents.

    Attributes:
        fingerprint: the digest of the model's fingerprint.
        probes: how many contexts were tried.
        context_tokens: their mean length.
        verdicts: one for each candidate.
    """

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    probes: int
    context_tokens: int
    verdicts: list[Verdict]

    def cheapest(self, max_kl: float) -> Verdict | None:
        """Return the cheapest strategy within `max_kl` that costs less than a full prefill; None if none does.

        Args:
            max_kl: the largest KL allowed, in nats per token.
        """
        passing = [verdict for verdict in self.verdicts if verdict.kl <= max_kl and verdict.cost < 1]
        return min(passing, key=lambda verdict: verdict.cost, default=None)

    def recommendation(self, max_kl: float) -> str:
        """Return the advice as one sentence: "merge with query at 10%: 0.02 nats per token at 21% of the cost"."""
        best = self.cheapest(max_kl)
        if best is None:
            return f"read the documents: no merge is cheaper than that and within {max_kl:g} nats per token"
        how = f"{best.strategy} at {best.ratio:.0%}" if best.ratio else best.strategy
        return f"merge with {how}: {best.kl:.2g} nats per token at {best.cost:.0%} of the cost"

    def save(self) -> Path:
        """Save the calibration for its model, replacing an earlier one, and return the file's path.

        Raises:
            StoreUnavailableError: the disk is full, or permission was denied.
        """
        return write_learned(_file(self.fingerprint), self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, fingerprint: str) -> Calibration | None:
        """Return the calibration that was saved for a model; None if no file exists, or the file is unreadable."""
        try:
            return cls.model_validate_json(read_learned(_file(fingerprint)))
        except ValidationError:
            return None


def calibrate(
    engine: HFEngine,
    documents: Sequence[str],
    questions: Sequence[str] = (),
    *,
    instruction: str | None = None,
    probes: int = 6,
    documents_per_probe: int = 4,
    tokens: int = 16,
    candidates: Sequence[Candidate] | None = None,
    seed: int = 0,
    retrieve: Callable[[str], Sequence[str]] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Compare merge strategies with a full prefill, on contexts made from your own documents.

    The result is saved under the model's fingerprint. `strategy="auto"` uses it, in this process and in later ones.

    Args:
        engine: the model.
        documents: at least two; each probe is a random choice of them.
        questions: asked in turn; without them each probe asks about the beginning of one of its documents.
        instruction: the text before the documents.
        probes: how many contexts to try.
        documents_per_probe: how many documents a context has.
        tokens: how many greedy tokens of the full prefill are compared.
        candidates: strategies and recompute ratios. The default is `CANDIDATES`, without those that a model with
            recurrent layers does not support.
        seed: seeds the random choice of documents.
        retrieve: returns the documents for one of `questions`, best first, as your application does. Without it, or
            without questions, documents are chosen at random.
        progress: called after each probe.

    Raises:
        InvalidInputError: fewer than two non-empty documents.
        ContextLengthError: a probe exceeds the model's context.
        UnsupportedModelError: the model's caches cannot be merged.
    """
    texts = [_ended(text) for text in documents if text.strip()]
    if len(texts) < 2:
        raise InvalidInputError(f"calibrate needs at least two documents with text; there are {len(texts)}. Pass more.")
    if candidates is None:
        candidates = [one for one in CANDIDATES if not engine.is_recurrent or one[0] in STATE_STRATEGIES]
    draw = random.Random(seed)
    measured: dict[Candidate, list[tuple[float, float, float]]] = {candidate: [] for candidate in candidates}
    lengths = []
    for probe in range(probes):
        chosen = draw.sample(texts, min(documents_per_probe, len(texts)))
        about = " ".join(chosen[-1].split()[:8])
        question = questions[probe % len(questions)] if questions else f"What do the documents say about: {about}?"
        if questions and retrieve is not None:
            chosen = [_ended(text) for text in retrieve(question)]
        one = _Probe(engine, chosen, question, instruction, tokens)
        lengths.append(len(one.context_ids))
        for candidate in candidates:
            if candidate[0] != "full" or probe == 0:  # `full` is a full prefill: one probe is enough
                measured[candidate].append(one.measure(*candidate))
        if progress:
            progress(probe + 1, probes)
    calibration = Calibration(
        fingerprint=engine.fingerprint.digest,
        probes=probes,
        context_tokens=int(statistics.mean(lengths)),
        verdicts=[
            Verdict(
                strategy=strategy,
                ratio=ratio,
                kl=statistics.mean(kl for kl, _, _ in rows),
                agreement=statistics.mean(agreement for _, agreement, _ in rows),
                cost=statistics.median(cost for _, _, cost in rows),
            )
            for (strategy, ratio), rows in measured.items()
        ],
    )
    calibration.save()
    _calibrations.setdefault(engine, {})[calibration.fingerprint] = calibration
    return calibration


def _ended(text: str) -> str:
    return text if text.endswith("\n") else f"{text}\n\n"


def calibration_of(engine: Engine) -> Calibration | None:
    """Return the calibration of this model, made by this process or an earlier one; None if it is not calibrated."""
    digest, known = engine.fingerprint.digest, _calibrations.setdefault(engine, {})
    if digest not in known:
        known[digest] = Calibration.load(digest)
    return known[digest]


_calibrations: WeakKeyDictionary[Engine, dict[str, Calibration | None]] = WeakKeyDictionary()
"""Per engine, by the digest of the fingerprint, since an engine may switch adapters."""


class _Probe:
    """One context and question, with its full prefill as the reference for `measure`."""

    def __init__(
        self, engine: HFEngine, texts: Sequence[str], question: str, instruction: str | None, tokens: int
    ) -> None:
        self.engine = engine
        prompt = engine.template.split_system(instruction, as_messages(question))
        segments = [engine.template.encode_text(text) for text in texts]
        self.tail_ids = prompt.tail_ids
        self.context_ids = tuple(chain(prompt.head_ids, *segments))
        engine.check_fits(len(self.context_ids) + len(self.tail_ids), tokens)
        before, _ = engine.prefill(prompt.head_ids)
        self.parts = [Part(torch.tensor(prompt.head_ids), before, 0, is_exact=True)]
        for index, ids in enumerate(segments):
            layers = engine.encode_after(prompt.head_ids, ids)
            part = Part(torch.tensor(ids), layers, len(prompt.head_ids), index == 0, states_before=states_of(before))
            self.parts.append(part)
        begin = time.perf_counter()
        cache, first = self._answer([], (*self.context_ids, *self.tail_ids))
        self.full_s = time.perf_counter() - begin
        self.tokens, rows = [int(first.argmax())], [first]
        while len(self.tokens) < tokens:
            rows.append(self._run(cache, self.tokens[-1:])[-1])
            self.tokens.append(int(rows[-1].argmax()))
        self.reference = torch.stack(rows).log_softmax(-1)

    def measure(self, strategy: MergeStrategy, ratio: float) -> tuple[float, float, float]:
        """Merge the context, and return `kl`, `agreement` and `cost` as in `Verdict`."""
        drift = usual_drift_of(self.engine)  # outside the timing, because it is learned once per model
        begin = time.perf_counter()
        with self.engine.exclusive() as model:
            tail_ids = torch.tensor(self.tail_ids)
            merged = merge(
                model,
                self.parts,
                tail_ids,
                strategy=strategy,
                ratio=ratio,
                usual_drift=lambda: drift,
                passes=self.engine.merge_passes,
            )
        if merged.read is None:
            cache, first = self._answer(merged.layers, self.tail_ids)
        else:
            room, first = len(self.context_ids), merged.read.logits[0].float()
            cache = generation_cache([merged.layers, layers_of(merged.read.cache)], room, kinds_of(self.engine.model))
        seconds = time.perf_counter() - begin
        rest = self._run(cache, self.tokens[:-1]) if len(self.tokens) > 1 else first[:0]
        logits = torch.cat([first[None], rest]).log_softmax(-1)
        kl = (self.reference.exp() * (self.reference - logits)).sum(-1).mean()
        agreement = (self.reference.argmax(-1) == logits.argmax(-1)).float().mean()
        return max(float(kl), 0.0), float(agreement), seconds / self.full_s

    def _answer(self, layers: list[Any], token_ids: Sequence[int]) -> tuple[Any, torch.Tensor]:
        """Prefill `token_ids` after `layers`, as `HFEngine.stream` does; return the cache and the last logits."""
        room = len(token_ids) + len(self.context_ids)
        cache = generation_cache([layers] if layers else [], room, kinds_of(self.engine.model))
        return cache, self.engine.forward(token_ids, cache)[0].float()

    def _run(self, cache: Any, token_ids: Sequence[int]) -> torch.Tensor:
        """Continue the cache with a few tokens; return the logits of each, fp32 `(tokens, vocabulary)`."""
        with self.engine.exclusive() as model:
            logits: torch.Tensor = run(model, torch.tensor(token_ids), cache).logits
        return logits[0].float()


def _file(fingerprint: str) -> Path:
    return learned_file("calibrations", f"{fingerprint}.json")


_INSTRUCTION = "Answer from the documents."

_TOKENS = 128
"""The most tokens that are read of each passage. A passage has about 115 with a usual vocabulary."""


def usual_drift_of(engine: HFEngine) -> UsualDrift | None:
    """Return the usual drift of a document's keys and values, which merges add where they recompute nothing.

    The drift is learned once per model, by encoding about 2,300 tokens of `PASSAGES`, and saved for later processes.
    Returns None for a model whose context is too short for two passages.
    """
    with engine.learning:
        digest, known = engine.fingerprint.digest, _drifts.setdefault(engine, {})
        if digest not in known:
            known[digest] = _usual_drift(engine)
        return known[digest]


_drifts: WeakKeyDictionary[HFEngine, dict[str, UsualDrift | None]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class LearnedDrift:
    """How documents of one corpus change after each other, for one model and namespace. Made by `KVCacheMemory.learn`.

    Attributes:
        digest: 16 hex digits that identify the drift's numbers. `MergeReport.drift` names the drift that was used.
        documents: the ids of the documents that it was learned from.
        tokens: how many tokens it was learned from.
        drift: the numbers, which a merge adds to the keys and values of moved documents.
    """

    digest: str
    documents: tuple[str, ...]
    tokens: int
    drift: UsualDrift = field(repr=False)


def learned_drift_of(engine: HFEngine, namespace: str) -> LearnedDrift | None:
    """Return the learned drift of a namespace, from this or another process; None if no drift was learned.

    The file is read again after another process replaced or deleted it, so that a text that is purged there is
    forgotten here too.
    """
    file = _learned_file(engine, namespace)
    stamp = _stamp(file)
    with engine.learning:
        known, key = _learned.setdefault(engine, {}), (engine.fingerprint.digest, namespace)
        changed = key in known and known[key][0] != stamp
        if changed or key not in known:
            known[key] = stamp, _read_drift(file)
        learned = known[key][1]
    if changed:
        engine.forget(namespace)  # its recent contexts were merged with the earlier drift
    return learned


_Stamp: TypeAlias = tuple[int, int, int] | None
"""A file's inode, modification time and size, which change when the file is replaced; None for a missing file."""

_learned: WeakKeyDictionary[HFEngine, dict[tuple[str, str], tuple[_Stamp, LearnedDrift | None]]] = WeakKeyDictionary()
"""Per engine, by the fingerprint's digest and the namespace: a file's stamp, and the drift that was read from it."""


def _stamp(file: Path) -> _Stamp:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


@torch.no_grad()
def learn_drift(
    engine: HFEngine,
    namespace: str,
    head_ids: Sequence[int],
    documents: Mapping[str, Sequence[int]],
    *,
    contexts: int,
    documents_per_context: int,
    seed: int,
    progress: Progress | None,
) -> LearnedDrift:
    """Learn a namespace's drift, and save it in place of an earlier one.

    Args:
        engine: the model.
        namespace: the namespace of the drift.
        head_ids: the tokens before the documents.
        documents: document id → token ids.
        contexts: as for `KVCacheMemory.learn`; so are the other arguments and the errors.
        documents_per_context: how many documents a context has.
        seed: seeds the random choice of documents.
        progress: called after each context.
    """
    if len(documents) < _LEAST_DOCUMENTS:
        raise InvalidInputError(
            f"learning a drift needs at least {_LEAST_DOCUMENTS} documents; there are {len(documents)}. Add more."
        )
    groups = _found_together(documents, contexts, documents_per_context, random.Random(seed))
    before, start, sums = (_encode(engine, [], head_ids) if head_ids else []), len(head_ids), DriftSums()
    longest = min(_LONGEST, (engine.context_length - start) // documents_per_context)
    used = tuple(sorted({name for group in groups for name in group}))
    file, key = _learned_file(engine, namespace), (engine.fingerprint.digest, namespace)
    claim = _claim(file, used)
    try:
        for done, group in enumerate(groups, start=1):
            first, *others = (list(documents[name][:longest]) for name in group)
            sums.add(rotations(engine.model), *_alone_and_together(engine, before, start, first, others))
            if progress:
                progress(done, len(groups))
    except BaseException:
        if claim is not None:
            claim.unlink(missing_ok=True)
        raise
    drift = sums.drift()
    learned = LearnedDrift(drift.digest, used, sums.tokens, drift)
    assert drift.slopes is not None
    tensors = {f"offset.{index}": layer for index, layer in enumerate(drift.layers)}
    tensors |= {f"slope.{index}": layer for index, layer in enumerate(drift.slopes)}
    about = {"documents": json.dumps(used), "tokens": str(sums.tokens)}
    try:
        write_learned(file, save(tensors, about))
        with engine.learning:
            _learned.setdefault(engine, {}).pop(key, None)  # the next use reads the file, with its stamp
    except StoreUnavailableError as error:
        warnings.warn(
            f"the learned drift could not be saved for later processes: {error}. "
            "Set KVCAG_CACHE to a writable folder, and learn it again.",
            CacheWarning,
            stacklevel=3,
        )
        with engine.learning:
            _learned.setdefault(engine, {})[key] = _stamp(file), learned
    if claim is not None:  # checked after writing the file, because a purge deletes the claim first, then the file
        try:
            claim.unlink()
        except FileNotFoundError:
            forget_drift(engine, namespace, used)
            raise StoreError(
                "a document was deleted while a drift was learned from it, so the drift was not saved. Learn it again."
            ) from None
    return learned


def _found_together(
    documents: Mapping[str, Sequence[int]], contexts: int, size: int, draw: random.Random
) -> list[list[str]]:
    """Return groups of similar documents, like those that a retriever finds for one question.

    A group is a random document and those most similar to it, by the cosine of their tokens' TF-IDF vectors. Every
    document is used once before any is used again.
    """
    names = sorted(documents)
    draw.shuffle(names)
    names = names[: max(_DRAWN, contexts * size)]
    found = [Counter(documents[name]) for name in names]
    places = {token: place for place, token in enumerate(sorted(set().union(*found)))}
    weights = torch.zeros(len(names), len(places))
    for row, tokens in zip(weights, found, strict=True):
        row[[places[token] for token in tokens]] = torch.tensor([*tokens.values()]).log1p()
    weights *= (len(names) / (weights > 0).sum(0)).log()
    weights /= weights.norm(dim=1, keepdim=True).clamp(min=1e-12)
    groups, left = list[list[str]](), list[int]()
    while len(groups) < contexts:
        if len(left) < 2:
            left = draw.sample(range(len(names)), len(names)) if groups else [*range(len(names))]
        similar = weights[left] @ weights[left[0]]
        similar[0] = torch.inf  # the document itself comes first
        group = [left[index] for index in similar.argsort(descending=True, stable=True)[:size].tolist()]
        groups.append([names[index] for index in group])
        left = [index for index in left if index not in group]
    return groups


_DRAWN = 512
"""The number of documents among which similar ones are looked for, at least."""


def _claim(file: Path, documents: Collection[str]) -> Path | None:
    """Write a file that names the documents from which a drift is being learned, and return its path.

    A process that purges one of the documents deletes the file, so that the learner notices. Returns None if the
    folder cannot be written; the drift then stays in this process.
    """
    try:
        return write_learned(file.with_suffix(f".{uuid.uuid4().hex}.claim"), json.dumps(sorted(documents)).encode())
    except StoreUnavailableError:
        return None


def forget_drift(engine: HFEngine, namespace: str, documents: Collection[str] | None = None) -> None:
    """Delete a namespace's drift, also one that is being learned, if it is learned from one of these documents.

    Args:
        engine: the model.
        namespace: the namespace of the drift.
        documents: document ids; None means all documents.

    Raises:
        StoreUnavailableError: the file cannot be deleted.
    """
    file = _learned_file(engine, namespace)
    for claim in file.parent.glob(f"{file.stem}.*.claim"):
        named = read_learned(claim)
        if documents is None or not named or not set(documents).isdisjoint(json.loads(named)):
            with unavailable(claim):
                claim.unlink(missing_ok=True)
    learned = learned_drift_of(engine, namespace)
    if learned is None or not (documents is None or set(learned.documents).intersection(documents)):
        return
    try:
        with unavailable(file):
            file.unlink(missing_ok=True)
    finally:
        with engine.learning:
            _learned.setdefault(engine, {})[engine.fingerprint.digest, namespace] = _stamp(file), None


def _learned_file(engine: HFEngine, namespace: str) -> Path:
    whose = hashlib.sha256(namespace.encode()).hexdigest()[:16]
    return learned_file("drift", f"{engine.fingerprint.digest}-learned-{whose}.safetensors")


def _read_drift(file: Path) -> LearnedDrift | None:
    content = read_learned(file)
    try:
        kept = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        layers = range(len(kept) // 2)
        drift = UsualDrift([kept[f"offset.{at}"] for at in layers], [kept[f"slope.{at}"] for at in layers])
        return LearnedDrift(drift.digest, tuple(json.loads(header["documents"])), int(header["tokens"]), drift)
    except (SafetensorError, KeyError, ValueError):  # missing, unreadable or damaged
        return None


_LEAST_DOCUMENTS = 10
_LONGEST = 512
"""The most tokens that are read of one document."""


def _usual_drift(engine: HFEngine) -> UsualDrift | None:
    head = engine.template.instruction_ids(_INSTRUCTION)
    passages = _passages(engine, engine.context_length - len(head))
    if len(passages) < 2:
        return None
    read = ids_digest(chain(head, *passages))
    file = learned_file("drift", f"{engine.fingerprint.digest}-{read[:16]}.safetensors")
    try:
        kept = load(read_learned(file))
        return UsualDrift([kept[str(index)] for index in range(len(kept))])
    except (SafetensorError, KeyError):  # missing, unreadable or damaged: learn it again
        drift = _learn(engine, head, passages)
    try:
        write_learned(file, save({str(index): layer.cpu() for index, layer in enumerate(drift.layers)}))
    except StoreUnavailableError as error:
        warnings.warn(
            f"the usual drift of this model's documents could not be saved for later processes: {error}. "
            "Each process will learn it again. Set KVCAG_CACHE to a writable folder.",
            CacheWarning,
            stacklevel=2,
        )
    return drift


def learn_on_server(engine: Engine, namespace: str) -> None:
    """Let a server that merges learn the usual drift, as `usual_drift_of` does, unless it already has."""
    head = engine.template.instruction_ids(_INSTRUCTION)
    engine.learn_drift(head, _passages(engine, engine.context_length - len(head) - 1), namespace)


def _passages(engine: Engine, room: int) -> list[tuple[int, ...]]:
    """Return the token ids of as many of `PASSAGES` as fit into `room` tokens."""
    passages: list[tuple[int, ...]] = []
    for text in PASSAGES:
        ids = engine.template.encode(f"{text}\n\n")[:_TOKENS]
        room -= len(ids)
        if room < 0:
            break
        passages.append(ids)
    return passages


@torch.no_grad()
def _learn(engine: HFEngine, head_ids: Sequence[int], passages: list[tuple[int, ...]]) -> UsualDrift:
    before, start = (_encode(engine, [], head_ids) if head_ids else []), len(head_ids)
    first, *others = passages
    return UsualDrift.between(rotations(engine.model), *_alone_and_together(engine, before, start, first, others))


def _alone_and_together(
    engine: HFEngine, before: list[LayerKV], start: int, first: Sequence[int], others: Sequence[Sequence[int]]
) -> tuple[Layers, torch.Tensor, Layers, torch.Tensor]:
    """Encode `others` twice: each alone after `before`, then all together after `before` and `first`.

    Returns their keys and values, `(1, kv_heads, seq_len, head_dim)` per layer, and positions, `(seq_len,)`, of both.
    """
    alone = concat([cut(_encode(engine, before, ids), start) for ids in others])
    together = cut(_encode(engine, before, [*first, *chain(*others)]), start + len(first))
    alone_at = torch.cat([start + torch.arange(len(ids)) for ids in others]).to(engine.device)
    together_at = start + len(first) + torch.arange(len(alone_at), device=engine.device)
    return alone, alone_at, together, together_at


def _encode(engine: HFEngine, before: list[LayerKV], ids: Sequence[int]) -> list[LayerKV]:
    """Encode `ids` after `before`, and return the keys and values of both. They do not become a recent context."""
    cache = generation_cache([before] if before else [], len(ids), kinds_of(engine.model))
    engine.forward(ids, cache)
    return layers_of(cache)


PASSAGES = (
    "The old bridge over the river was built between 1871 and 1874 by the engineer Thomas Whitmore, who had already "
    "worked on two railway lines in the north. It has five stone arches, of which the middle one is the widest, and "
    "it carried carts, trams and later motor cars until a new crossing was opened further upstream. Since then only "
    "people on foot and on bicycles have used it. In 1968 the town council wanted to pull it down, but a group of "
    "residents collected eleven thousand signatures, and the bridge was put on the list of protected buildings. It "
    "was last repaired in 2009, when the paving was replaced.",
    "Maria Alvarez (born 12 March 1949) is a Spanish painter and teacher. She grew up in a village near Salamanca as "
    "the youngest of four sisters and studied at the School of Fine Arts in Madrid, where she later taught drawing "
    "for more than twenty years. Her early work shows landscapes in dark colours; from 1985 on she painted mostly "
    "portraits. Her pictures are held by museums in Bilbao, Lisbon and Chicago. In 1997 she received the National "
    "Prize for her series of forty portraits of nurses. She is married to the film director Julian Ortega, and they "
    "have one daughter.",
    "To change the filter, first switch the machine off and wait until it has cooled down. Open the cover on the left "
    "side by pressing the two tabs together, and pull the used filter out by its handle. Rinse the housing with clean "
    "water. Do not use soap or other cleaning agents. Insert the new filter so that the arrow points upwards, close "
    "the cover until it clicks, and switch the machine on again. The light flashes for about thirty seconds while the "
    "filter is filled. If the light does not go out, check whether the water tank is full and whether the filter is "
    "seated properly.",
    "Bees find their way by the position of the sun, by landmarks and by the pattern of polarised light in the sky. A "
    "worker that has found a rich source of nectar returns to the hive and performs a dance on the comb, by which the "
    "others learn in which direction and how far away it lies. The angle of the dance to the vertical is the angle "
    "between the sun and the source. The longer the straight part of the dance takes, the greater the distance. Other "
    "workers follow the dancer closely, touch her with their antennae, and then fly out by themselves to look for the "
    "place.",
    "The second season of the television series was first shown in the autumn of 2014 and has thirteen episodes. It "
    "continues the story of the lawyer Anna Keller, who has moved to the coast after the trial and opens a small "
    "office there with her brother. Most of the actors of the first season returned; the part of the judge was given "
    "to Peter Lindqvist. The music was written by the band Northern Lights, whose song 'Harbour' reached number four "
    "in the charts. The season was watched by an average of 3.2 million people, and critics praised its slow and "
    "careful storytelling.",
    "Dear Mr Hansen, thank you for your letter of 4 May. We are sorry to hear that the table which you ordered from "
    "us arrived with a damaged leg. We have asked our carrier to collect it from your address on Thursday between "
    "eight and twelve o'clock, and we will send you a new one in the same week. You do not have to pay anything for "
    "this. If nobody is at home on that day, please call our office under the number below, and we will agree on "
    "another date. Please keep the screws and the small bag of tools, because the new table is delivered without "
    "them.",
    "The company was founded in 1923 in a garage in Cleveland by the brothers Edward and Frank Miller, who made parts "
    "for radios. By 1940 it had six hundred employees and two factories. After the war it turned to kitchen "
    "appliances, and its electric kettle, designed by Ruth Sandberg, sold more than nine million pieces. In 1986 the "
    "firm was bought by the Dutch group Van Dijk for 410 million dollars, which moved the head office to Rotterdam "
    "and closed the older of the two factories. Today about 1,900 people work for it in five countries, and its main "
    "products are heaters, fans and water pumps.",
    "Water that is cooled below the freezing point does not always turn into ice at once. If it is very clean and is "
    "not moved, it can stay liquid down to about minus forty degrees. The reason is that a crystal needs a place at "
    "which it can begin to grow, such as a grain of dust or a scratch in the wall of the vessel. As soon as such a "
    "nucleus is present, the ice spreads through the whole liquid within a second, and heat is released, so that the "
    "temperature rises to zero. Clouds often consist of such droplets, which freeze when an aircraft flies through "
    "them.",
    "The county lies in the south-west of the state and borders on the ocean. It has an area of 4,120 square "
    "kilometres and, according to the census of 2010, a population of 63,043. The county seat and largest city is "
    "Port Henry. Most of the land is covered with forest, and for a long time the timber trade was the most important "
    "source of income; today it is tourism and fishing. The highest point is Mount Barlow with 1,302 metres. The "
    "county was created in 1853 and is named after Samuel Barlow, the first governor, who had surveyed the coast as a "
    "young officer in the navy.",
    "Employees who fall ill must inform their manager before ten o'clock in the morning of the first day. A "
    "certificate from a doctor is needed from the fourth day on, and has to be sent to the personnel department "
    "within one week. Holidays are to be applied for at least three weeks in advance; up to five days that were not "
    "taken can be carried over into the first quarter of the next year. Those who work on Sundays or on public "
    "holidays receive a supplement of fifty per cent, or a day off instead. Questions about these rules are answered "
    "by the works council on Tuesday afternoons.",
)
"""Ten short texts of different kinds, written for this purpose."""


def learned_file(kind: str, name: str) -> Path:
    """Return the path of a learned file: below `KVCAG_CACHE`, or else below the user's cache folder."""
    root = os.environ.get("KVCAG_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvcag"
    return Path(root).expanduser() / kind / name


def write_learned(path: Path, content: bytes) -> Path:
    """Write a file with a checksum, readable by this user only, in place of an earlier one.

    Raises:
        StoreUnavailableError: the disk is full, or permission was denied.
    """
    with unavailable(path):
        make_private(path.parent)
    with atomic_write(path) as temporary:
        temporary.write_bytes(checksum(content).encode() + content)
    return path


def read_learned(path: Path) -> bytes:
    """Read a file that `write_learned` wrote. Returns `b""` if it is missing, unreadable, cut or changed."""
    try:
        data = path.read_bytes()
    except OSError:
        return b""
    seal, content = data[:16], data[16:]
    return content if seal == checksum(content).encode() else b""
