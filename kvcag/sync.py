"""Corpora: chooses the document after which each document is encoded, and makes a store match a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from kvcag.errors import CacheWarning, EmptyPromptError, InvalidInputError, StoreError
from kvcag.stores.base import SOURCE_FIELDS, stands_behind
from kvcag.stores.files import Manifest

if TYPE_CHECKING:
    from kvcag.contexts import DocumentCache, Ids, Read

Context: TypeAlias = Literal["previous"] | object
"""How to choose the document between the instruction and each document. `"previous"`: the previous document of the same
source. A retriever (a function, or an object with `invoke` or `retrieve`): the first other document that it returns for
the text."""


def in_context(
    documents: Sequence[Read], context: Context | None, read: Callable[[object], Read] | None = None
) -> list[Read]:
    """Set `behind` of each document, the document after which it is to be encoded. None changes nothing.

    Args:
        documents: in the order of their sources.
        context: see `Context`.
        read: makes a `Read` of a retriever's result; not needed for `"previous"`.

    Raises:
        InvalidInputError: `context` is neither `"previous"` nor a retriever.
    """
    if context is None:
        return list(documents)
    if context == "previous":
        last: dict[object, Read] = {}
        found = []
        for document in documents:
            source = next((document.metadata[name] for name in _SOURCES if document.metadata.get(name)), None)
            found.append([last[source]] if source in last else [])
            last[source] = document
    else:
        ask = next((call for name in _ASKED if callable(call := getattr(context, name, None))), context)
        if not callable(ask) or read is None:
            raise InvalidInputError(
                f"context is {context!r:.80}: pass 'previous', a retriever, or a function from a text to documents"
            )
        found = [[read(one) for one in ask(document.text)] for document in documents]
    others = [
        [one for one in near if one.text.strip() not in ("", document.text.strip())][:1]
        for document, near in zip(documents, found, strict=True)
    ]
    return [document._replace(behind=near) for document, near in zip(documents, others, strict=True)]


_ASKED = ("invoke", "retrieve")
"""The methods that call a retriever, of LangChain and of LlamaIndex."""
_SOURCES = tuple(field for field in SOURCE_FIELDS if field != "source_text")
_CORPORA = "corpora"
"""A metadata key of the items that `sync` stores, with the names of the corpora that the item belongs to."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """The result of `KVCacheMemory.sync`.

    Attributes:
        encoded: the number of documents that were encoded.
        kept: the number of documents that were in the store already.
        dropped: the number of documents that left the corpus.
        ids: the ids of the corpus's documents.
        failed: id → reason, for items that could not be read or deleted. They may still have dropped texts.
    """

    encoded: int
    kept: int
    dropped: int
    ids: list[str]
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SyncDiff:
    """The difference between a corpus and a store.

    Attributes:
        wanted: id → token ids, text and metadata of each document, in the corpus's order.
        new: ids of documents that are not in the store yet.
        gone: ids of items of this corpus whose documents left the corpus.
    """

    wanted: dict[str, Read]
    new: list[str]
    gone: list[str]


def diff(
    documents: DocumentCache, head_ids: Ids, corpus: Iterable[Read], is_mine: Callable[[Manifest], bool] | None = None
) -> SyncDiff:
    """Compare a corpus with the stored items. Nothing is changed.

    Args:
        documents: finds, encodes and stores documents.
        head_ids: the tokens before the documents.
        corpus: token ids, text and metadata of each document. Documents with the same text are one document.
        is_mine: whether a stored item belongs to this corpus; other items are never `gone`. None: `gone` is empty.

    Raises:
        EmptyPromptError: a document is empty.
    """
    wanted = _wanted(documents, corpus)
    kept = documents.containing(head_ids, wanted)
    stored = documents.store.manifests() if is_mine else ()
    gone = [key for key, manifest in stored if key not in wanted and is_mine and is_mine(manifest)]
    return SyncDiff(wanted, [key for key in wanted if key not in kept], gone)


def _wanted(documents: DocumentCache, corpus: Iterable[Read]) -> dict[str, Read]:
    wanted: dict[str, Read] = {}
    for number, read in enumerate(corpus, start=1):
        if not read.text.strip():
            raise EmptyPromptError(f"document {number} of the corpus is empty: leave it out")
        wanted[documents.key(read.token_ids)] = read
    return wanted


def sync(documents: DocumentCache, head_ids: Ids, corpus: Iterable[Read], name: str) -> SyncReport:
    """Encode new documents of a corpus, keep unchanged ones, and delete those that left it.

    A document of several corpora is deleted when it has left all of them. A document that was stored in another way,
    such as by `KVCacheMemory.add`, belongs to no corpus and is not deleted.

    Args:
        documents: finds, encodes and stores documents.
        head_ids: the tokens before the documents.
        corpus: token ids, text and metadata of each document.
        name: the corpus's name. Documents of other corpora are not deleted.

    Raises:
        EmptyPromptError: a document is empty. Nothing was changed.
    """
    wanted = _wanted(documents, corpus)
    labels, failed = dict[str, list[str]](), dict[str, str]()
    texts, behind = dict[str, str](), dict[str, list[str]]()
    try:
        for item in documents.store.listing():
            if item.manifest is None:
                failed[item.name] = item.error
            else:
                labels[item.manifest.id] = item.manifest.metadata.get(_CORPORA, [])
                behind[item.manifest.id] = stands_behind(item.manifest)
                texts[item.manifest.id] = item.manifest.records.composed_text_memory.strip()
    except StoreError as gone_store:
        failed[documents.store.place] = str(gone_store)
        documents.warn("documents are encoded, and may not be stored", gone_store)

    def label(key: str, names: list[str]) -> None:
        try:
            documents.update(key, {_CORPORA: names})
        except StoreError as error:
            failed[key] = str(error)

    gone = [key for key, names in labels.items() if name in names and key not in wanted]
    shared = {key: rest for key in gone if (rest := [other for other in labels[key] if other != name])}
    forgotten = {texts[key] for key in gone if key not in shared}
    encoded = 0
    for key, read in wanted.items():
        if read.behind is None and not forgotten.isdisjoint(behind.get(key, [])):
            wanted[key] = read._replace(behind=[])
    there = documents.containing(head_ids, wanted)
    for key, read in wanted.items():
        names = list(dict.fromkeys([*labels.get(key, []), name]))
        if key not in there:
            documents.find_or_encode(head_ids, *read._replace(metadata={**read.metadata, _CORPORA: names}))
            encoded += 1
        elif labels.get(key) and names != labels[key]:
            label(key, names)
    for key, rest in shared.items():
        label(key, rest)
    failed |= documents.store.erase([key for key in gone if key not in shared]).failed
    for what, why in failed.items():
        if what != documents.store.place:
            documents.notices.once(f"{what} may still have a text that a corpus dropped: {why}", CacheWarning, why)
    return SyncReport(encoded, len(wanted) - encoded, len(gone), list(wanted), failed)
