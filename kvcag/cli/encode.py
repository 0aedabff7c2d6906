"""`kvcag encode` and `kvcag sync`: files into a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcag.cli import output
from kvcag.cli.group import say
from kvcag.cli.options import INSTRUCTION, Instruction, Json, Model, Namespace, Store, default_store
from kvcag.errors import InvalidInputError

if TYPE_CHECKING:
    from kvcag.cli.files import Reading, Text
    from kvcag.document_cache import DocumentCache, Ids, Read, SyncDiff
    from kvcag.stores.base import KVStore
    from kvcag.stores.format import Manifest

Split = Annotated[
    int | None, typer.Option("--split", min=16, metavar="TOKENS", help="Cut longer files at paragraphs, into so many.")
]


def encode(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files, folders or globs of UTF-8 text.")],
    model: Model = None,
    store: Store = None,
    namespace: Namespace = "",
    instruction: Instruction = INSTRUCTION,
    split: Split = None,
    as_json: Json = False,
) -> None:
    """Encode texts, one item a file, and keep them. What is kept already is not encoded again.

    In folders, .txt, .text, .md, .markdown, .rst and .jsonl files are read (a line of .jsonl is an item: an object with
    a string "text"). Interrupted, it keeps what is done; run again, it goes on.

    For example:

        kvcag encode notes/ README.md 'docs/**/*.rst'

        kvcag encode book.txt --split 1024

        kvcag encode notes/ --json | jq .encoded
    """
    reading = _read(paths)
    keeper, head_ids = _keeper(model, store, namespace, instruction)
    planned = _plan(keeper, head_ids, reading.texts, split, lambda manifest: False)
    encoded = _encode(keeper, head_ids, planned)
    done = {"encoded": len(planned.new), "kept": len(planned.wanted) - len(planned.new)}
    kept = f"{output.counted(done['encoded'], 'item')} encoded ({encoded:,} tokens), {done['kept']} kept already"
    _report({**done, "tokens": encoded}, kept, planned, reading, keeper, as_json)


def sync(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file or a folder.")],
    model: Model = None,
    store: Store = None,
    namespace: Namespace = "",
    instruction: Instruction = INSTRUCTION,
    split: Split = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Bring what is kept of a path in step with it: encode what is new or changed, keep the rest, drop what is gone.

    Only items that this model made of this path under the same instruction are dropped.

    For example:

        kvcag sync notes/ --dry-run

        kvcag sync notes/
    """
    reading = _read([path], empty_is_fine=True)
    keeper, head_ids = _keeper(model, store, namespace, instruction, create=not dry_run)
    planned = _plan(keeper, head_ids, reading.texts, split, _made_here(keeper, head_ids, path, reading.unreadable))
    encoded = 0
    if not dry_run:
        encoded = _encode(keeper, head_ids, planned)
        _drop(keeper, planned.gone)
    done = {"encoded": len(planned.new), "kept": len(planned.wanted) - len(planned.new), "dropped": len(planned.gone)}
    line = ", ".join(f"{count} {verb}" for verb, count in done.items())
    facts = {**done, "tokens": encoded, "dry_run": dry_run}
    _report(facts, f"would be: {line}" if dry_run else line, planned, reading, keeper, as_json)


def _read(paths: Sequence[str], *, empty_is_fine: bool = False) -> Reading:
    from kvcag.cli.files import read_paths

    reading = read_paths(paths)
    if not reading.texts and not empty_is_fine:
        raise InvalidInputError("; ".join(reason for _, reason in reading.skipped))
    for _, reason in reading.skipped:
        say(f"skipped: {reason}")
    if reading.others:
        say(f"{output.counted(reading.others, 'file')} of other kinds passed over")
    return reading


def _keeper(
    model: str | None, store: Path | None, namespace: str, instruction: str, *, create: bool = True
) -> tuple[DocumentCache, Ids]:
    """Where texts go, and what stands before them. The store is opened first: it takes less long to fail."""
    from kvcag.cli.loading import load_engine
    from kvcag.document_cache import DocumentCache
    from kvcag.stores.disk import DiskStore

    opened = DiskStore(store or default_store(), namespace=namespace) if create else _look_into(store, namespace)
    engine = load_engine(model)
    head_ids = engine.template.instruction_ids(instruction)
    return DocumentCache(engine, opened, namespace), head_ids


def _look_into(store: Path | None, namespace: str) -> KVStore:
    """A store that is only looked into: empty where there is none."""
    from kvcag.cli.entries import open_existing
    from kvcag.stores.memory import MemoryStore

    missing = store is not None and not store.is_dir()
    return (None if missing else open_existing(store, namespace)) or MemoryStore()


def _plan(
    keeper: DocumentCache,
    head_ids: Ids,
    texts: Sequence[Text],
    limit: int | None,
    mine: Callable[[Manifest], bool],
) -> SyncDiff:
    """What is new. Refuses what does not fit before anything is encoded."""
    from kvcag.cli.files import split
    from kvcag.document_cache import diff
    from kvcag.documents import segment

    template, room = keeper.engine.template, keeper.engine.context_length - len(head_ids)
    pieces = texts if limit is None else [p for t in texts for p in split(t, limit, lambda s: len(template.encode(s)))]
    read: list[Read] = []
    for piece in pieces:
        token_ids = template.encode(segment(piece.text))
        if len(token_ids) > room:
            raise InvalidInputError(
                f"{piece.metadata['source']}: {len(token_ids):,} tokens, and the model's context holds {room:,} after "
                f"the instruction. Cut it with --split {max(16, room // 8)}."
            )
        read.append((token_ids, piece.text, piece.metadata))
    return diff(keeper, head_ids, read, mine)


def _encode(keeper: DocumentCache, head_ids: Ids, planned: SyncDiff) -> int:
    """Encode and keep what is new; how many tokens that were."""
    total = sum(len(planned.wanted[key][0]) for key in planned.new)
    try:
        with output.progress("encoding", total, "tokens") as advance:
            for key in planned.new:
                token_ids, text, metadata = planned.wanted[key]
                advance(0, os.path.basename(metadata["source"]))
                keeper.put(keeper.encode(head_ids, token_ids, text, metadata))
                advance(len(token_ids))
    except KeyboardInterrupt:
        kept = sum(map(keeper.store.contains, planned.new))
        say(f"{kept} of {output.counted(len(planned.new), 'item')} encoded and kept; run it again to go on.")
        raise
    return total


def _made_here(keeper: DocumentCache, head_ids: Ids, path: str, unreadable: set[str]) -> Callable[[Manifest], bool]:
    """Whether an item was made of this path, by this model, and not of a file that cannot be read today."""
    from kvcag.cli.entries import CONTEXT_OF, comes_from
    from kvcag.core import ids_digest

    prefix, model = ids_digest(head_ids), keeper.engine.fingerprint

    def made_here(manifest: Manifest) -> bool:
        if CONTEXT_OF in manifest.metadata:  # leaves with the items that it holds
            return False
        same = manifest.fingerprint is not None and model.matches(manifest.fingerprint)
        readable = manifest.metadata.get("source") not in unreadable
        return same and readable and manifest.prefix_digest == prefix and comes_from(manifest, path)

    return made_here


def _drop(keeper: DocumentCache, gone: Sequence[str]) -> None:
    """Delete items, and the contexts that hold them."""
    from kvcag.cli.entries import CONTEXT_OF

    if not gone:
        return
    store, leaving = keeper.store, set(gone)
    for key in list(store.keys()):
        manifest = store.manifest(key)
        if manifest and not leaving.isdisjoint(manifest.metadata.get(CONTEXT_OF, [])):
            leaving.add(key)
    store.delete(leaving)


def _report(
    facts: dict[str, Any], line: str, planned: SyncDiff, reading: Reading, keeper: DocumentCache, as_json: bool
) -> None:
    from kvcag.stores.disk import DiskStore

    place = keeper.store.path if isinstance(keeper.store, DiskStore) else None
    if as_json:
        skipped = [{"path": path, "reason": reason} for path, reason in reading.skipped]
        output.emit({**facts, "store": place, "ids": list(planned.wanted), "skipped": skipped})
    else:
        typer.echo(f"{line}; in {place}" if place else line)
