"""What was asked for: texts as retrievers find them, and as they then stand in prompts."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvcag.chat_template import Prompt
from kvcag.core import ids_digest
from kvcag.document_cache import Ids
from kvcag.scheduler.policy import Use
from kvcag.stores.base import SOURCE_FIELDS

_FEWEST = 20
"""Texts that a round has at least, so that the first questions do not count as many rounds."""
_ANSWERED_WITHIN_S = 60.0
_UNANSWERED = 64
_PLACES = 64


def digest_of(text: str) -> str:
    """Which text this is, whatever white space stands around it: SHA-256, in hex."""
    return hashlib.sha256(text.strip().encode()).hexdigest()


@dataclass(slots=True)
class Known:
    """A text that was asked for.

    Attributes:
        use: how often, and when.
        tokens: in it; estimated until it stood in a prompt.
        text: as it stands in prompts if `asked`, else as a retriever found it. None once it is written down.
        asked: it stood in a prompt.
        place: where it stood last.
        sources: what its metadata names as its source.
    """

    use: Use
    tokens: int
    text: str | None = None
    asked: bool = False
    place: str | None = None
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Place:
    """Where documents stand in prompts.

    Attributes:
        head_ids: the tokens before the first document.
        ending: what stands after a text there; None where prompts do not show texts as retrievers find them.
        last: the moment of the last question.
    """

    head_ids: Ids
    ending: str | None
    last: float = 0.0


@dataclass(slots=True)
class _Pending:
    """A text that was retrieved, and may be asked in a moment: the two are one use."""

    text: str
    times: int
    at: float


class Counters:
    """What is known of texts. Safe to use from several threads; nothing here takes longer than a look at the texts.

    Attributes:
        known: each text, by its digest.
        places: where documents stood, by the digest of the tokens before them.
        identities: which text an id stood for last.
        shown_as: the text that stands in prompts for one that is retrieved, where they differ.
        now: rounds since the beginning.
        changed: texts that nothing stands for any more, since another took their place.
        fresh: digests of what was not written down yet.
    """

    def __init__(self) -> None:
        self.known: dict[str, Known] = {}
        self.places: dict[str, Place] = {}
        self.identities: dict[str, str] = {}
        self.shown_as: dict[str, str] = {}
        self.now = 0.0
        self.changed: list[str] = []
        self.fresh: set[str] = set()
        self.lock = threading.RLock()
        self._pending: OrderedDict[str, _Pending] = OrderedDict()

    def place_for(self, known: Known) -> Place | None:
        """Where a text is to be encoded: where it stood last, else where what retrievers find stood last."""
        with self.lock:
            if known.place in self.places:
                return self.places[known.place]
            usable = [place for place in self.places.values() if known.asked or place.ending is not None]
            return max(usable, key=lambda place: place.last, default=None)

    def use_of(self, digest: str) -> Use:
        """The uses of a text; none for one that is not known."""
        known = self.known.get(digest)
        return known.use if known else Use()

    def retrieved(self, text: str, identity: str | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        """A retriever found a text.

        Args:
            text: as it was found.
            identity: what stands for it. Another text under the same one replaces it.
            metadata: its own; what names its source is remembered.
        """
        with self.lock:
            found = digest_of(text)
            digest = self.shown_as.get(found, found)
            known = self._count(digest, text)
            known.sources |= {name: str(metadata[name]) for name in SOURCE_FIELDS if metadata and metadata.get(name)}
            if identity is not None:
                self._identify(identity, digest)
            waiting = self._pending.pop(digest, None) or _Pending(text, 0, 0.0)
            self._pending[digest] = _Pending(text, waiting.times + 1, time.monotonic())
            if len(self._pending) > _UNANSWERED:
                self._pending.popitem(last=False)

    def asked(self, prompt: Prompt) -> None:
        """A prompt is about to be answered from its documents."""
        if not prompt.documents:  # only ids, which say nothing of the texts
            return
        with self.lock:
            texts = [(digest_of(text), text) for text in prompt.documents]
            found = [self._answered(digest) for digest, _ in texts]
            rendered = False  # whether prompts show something else than retrievers find
            endings: set[str] = set()
            for (digest, text), retrieved in zip(texts, found, strict=True):
                self.shown_as.pop(digest, None)
                if retrieved is not None and digest_of(retrieved) == digest:
                    endings.add(text[len(retrieved) :])
                elif retrieved is not None or self._is_shown_for_another(digest, text):
                    rendered = True
                else:
                    self._count(digest, text)
            place = self._place(prompt, endings, rendered)
            for (digest, text), ids in zip(texts, prompt.document_ids, strict=True):
                known = self.known.get(digest) or self._count(digest, text)  # it may have been purged meanwhile
                if not known.asked or known.text is not None or known.place != place:
                    known.text = text
                known.asked, known.place, known.tokens = True, place, len(ids)
                self.fresh.add(digest)

    def met(self, text: str, tokens: int) -> None:
        """A text was encoded, for whatever reason. That is no use of it."""
        with self.lock:
            digest = digest_of(text)
            if digest not in self.known:
                self.known[digest] = Known(Use(last=self.now), tokens, text)
                self.fresh.add(digest)

    def forget(self, digest: str) -> None:
        """Know a text no longer."""
        with self.lock:
            self.known.pop(digest, None)
            self._pending.pop(digest, None)
            self.fresh.discard(digest)
            for names in (self.identities, self.shown_as):
                for name in [name for name, meant in names.items() if meant == digest]:
                    del names[name]

    def _count(self, digest: str, text: str) -> Known:
        known = self.known.get(digest)
        if known is None:
            known = self.known[digest] = Known(Use(last=self.now), len(text) // 4 + 1, text)
        self.now += 1 / max(len(self.known), _FEWEST)
        known.use.again(self.now)
        self.fresh.add(digest)
        return known

    def _identify(self, identity: str, digest: str) -> None:
        before = self.identities.get(identity)
        self.identities[identity] = digest
        if before is not None and before != digest and before not in self.identities.values():
            self.changed.append(before)

    def _answered(self, digest: str) -> str | None:
        """The text as it was retrieved a moment ago, if it was: that use is counted."""
        waiting = self._pending.get(digest)
        if waiting is None or time.monotonic() - waiting.at > _ANSWERED_WITHIN_S:
            return None
        waiting.times -= 1
        if not waiting.times:
            del self._pending[digest]
        return waiting.text

    def _is_shown_for_another(self, digest: str, text: str) -> bool:
        """Whether a text that was retrieved a moment ago stands within this one, and is shown as this from now on."""
        latest = time.monotonic() - _ANSWERED_WITHIN_S
        for found, waiting in self._pending.items():
            inner = waiting.text.strip()
            if waiting.at >= latest and inner and inner in text:
                self._replace(found, digest, text)
                return True
        return False

    def _replace(self, found: str, digest: str, text: str) -> None:
        """Let a text stand for one that retrievers find: its uses, its sources and its identity go over."""
        self._answered(found)
        was = self.known.get(found)
        alone = was is not None and not was.asked  # it never stood in a prompt as it is
        if was is not None and alone and digest not in self.known:
            self.known[digest] = Known(was.use, was.tokens, text, sources=was.sources)
        else:
            self._count(digest, text)
        if alone:
            del self.known[found]
        self.fresh |= {found, digest}
        self.shown_as[found] = digest
        for identity, meant in self.identities.items():
            if meant == found:
                self.identities[identity] = digest

    def _place(self, prompt: Prompt, endings: set[str], rendered: bool) -> str:
        """Remember where documents stand, and what stands after them.

        Args:
            prompt: the prompt.
            endings: what stands in it after texts as they were retrieved a moment ago.
            rendered: it shows others in another form.
        """
        name = ids_digest(prompt.head_ids)
        place = self.places.get(name)
        if place is None:
            first = prompt.documents[0]
            place = self.places[name] = Place(prompt.head_ids, first[len(first.rstrip()) :])
            if len(self.places) > _PLACES:
                del self.places[min(self.places, key=lambda name: self.places[name].last)]
        if rendered:
            place.ending = None
        elif endings:
            place.ending = min(endings)
        place.last = self.now
        return name
