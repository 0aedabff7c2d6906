"""`kvcag encode` and `kvcag sync`: files into a store."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvcag.cli import output
from kvcag.cli.group import say
from kvcag.cli.options import (
    INSTRUCTION,
    Instruction,
    Json,
    Model,
    Namespace,
    Store,
    default_store,
    load_engine,
)
from kvcag.errors import InvalidInputError

if TYPE_CHECKING:
    from kvcag.cli.files import Reading
    from kvcag.contexts import SyncDiff
    from kvcag.memory import KVCacheMemory
    from kvcag.stores.base import KVStore
    from kvcag.stores.format import Manifest

Split = Annotated[
    int | None,
    typer.Option("--split", min=16, metavar="TOKENS", help="Cut files into items of at most this many tokens."),
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
    """Encode files and keep their caches, one item per file. Items that are in the store are not encoded again.

    In folders, .txt, .text, .md, .markdown, .rst and .jsonl files are read. Each line of a .jsonl file is an item: an
    object with a string "text". An interrupted run keeps its finished items; run the command again to continue.

    For example:

        kvcag encode notes/ README.md 'docs/**/*.rst'

        kvcag encode book.txt --split 1024

        kvcag encode notes/ --json | jq .encoded
    """
    from kvcag.cli.files import read_texts
    from kvcag.stores.disk import DiskStore

    reading = read_texts(paths)
    opened = DiskStore(store or default_store(), namespace=namespace)  # before the model: it fails sooner
    memory = _memory(model, opened, instruction, namespace)
    diff = _diff(memory, reading, split, lambda manifest: False)
    tokens = _encode(memory, diff)
    done = {"encoded": len(diff.new), "kept": len(diff.wanted) - len(diff.new)}
    line = f"{output.counted(done['encoded'], 'item')} encoded ({tokens:,} tokens), {done['kept']} kept already"
    _report({**done, "tokens": tokens}, line, diff, reading, memory, as_json)


def sync(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file or a folder.")],
    model: Model = None,
    store: Store = None,
    namespace: Namespace = "",
    instruction: Instruction = INSTRUCTION,
    split: Split = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Update the items of a file or folder: encode new and changed texts, keep the others, delete removed ones.

    Only items that this model made of this path are deleted.

    For example:

        kvcag sync notes/ --dry-run

        kvcag sync notes/
    """
    from kvcag.cli.entries import open_existing, read_entries, with_contexts
    from kvcag.cli.files import read_texts
    from kvcag.stores.disk import DiskStore
    from kvcag.stores.memory import MemoryStore

    reading = read_texts([path], may_be_empty=True)
    opened: KVStore
    if not dry_run:
        opened = DiskStore(store or default_store(), namespace=namespace)
    else:
        exists = store is None or store.is_dir()
        opened = (open_existing(store, namespace) if exists else None) or MemoryStore()
    memory = _memory(model, opened, instruction, namespace)
    diff = _diff(memory, reading, split, _made_here(memory, path, reading.unreadable))
    tokens = 0
    if not dry_run:
        tokens = _encode(memory, diff)
        if diff.gone:
            entries, _ = read_entries(opened)
            gone = [entry for entry in entries if entry.id in set(diff.gone)]
            opened.delete(entry.id for entry in with_contexts(entries, gone))
    done = {"encoded": len(diff.new), "kept": len(diff.wanted) - len(diff.new), "dropped": len(diff.gone)}
    line = ", ".join(f"{count} {verb}" for verb, count in done.items())
    facts = {**done, "tokens": tokens, "dry_run": dry_run}
    _report(facts, f"would be: {line}" if dry_run else line, diff, reading, memory, as_json)


def _memory(model: str | None, store: KVStore, instruction: str, namespace: str) -> KVCacheMemory:
    engine = load_engine(model)
    from kvcag.memory import KVCacheMemory

    return KVCacheMemory(engine, store, instruction, namespace=namespace)


def _diff(memory: KVCacheMemory, reading: Reading, limit: int | None, is_mine: Callable[[Manifest], bool]) -> SyncDiff:
    """Compare the texts with the store. A text that does not fit is refused before anything is encoded."""
    from kvcag.cli.files import split
    from kvcag.contexts import diff
    from kvcag.documents import segment

    template = memory.engine.template
    head_ids = template.instruction_ids(memory.instruction)
    room = memory.engine.context_length - len(head_ids)
    read = []
    for text in reading.texts:
        for piece in [text] if limit is None else split(text, limit, lambda part: len(template.encode_text(part))):
            token_ids = template.encode_text(segment(piece.text))
            if len(token_ids) > room:
                raise InvalidInputError(
                    f"{piece.metadata['source']}: {len(token_ids):,} tokens, and the model's context holds {room:,} "
                    f"after the instruction. Cut it with --split {max(16, room // 8)}."
                )
            read.append((token_ids, piece.text, piece.metadata))
    return diff(memory.documents, head_ids, read, is_mine)


def _encode(memory: KVCacheMemory, diff: SyncDiff) -> int:
    """Encode and keep new texts; return the number of their tokens."""
    documents, head_ids = memory.documents, memory.engine.template.instruction_ids(memory.instruction)
    total = sum(len(diff.wanted[key][0]) for key in diff.new)
    try:
        with output.progress("encoding", total, "tokens") as advance:
            for key in diff.new:
                token_ids, text, metadata = diff.wanted[key]
                advance(0, os.path.basename(metadata["source"]))
                documents.put(documents.encode(head_ids, token_ids, text, metadata))
                advance(len(token_ids))
    except KeyboardInterrupt:
        kept = sum(map(documents.store.contains, diff.new))
        say(f"{kept} of {output.counted(len(diff.new), 'item')} encoded and kept; run the command again to continue.")
        raise
    return total


def _made_here(memory: KVCacheMemory, path: str, unreadable: set[str]) -> Callable[[Manifest], bool]:
    """Return a test for items of this path and model, but not of files that cannot be read today."""
    from kvcag.cli.entries import comes_from
    from kvcag.stores.base import MADE_OF

    def made_here(manifest: Manifest) -> bool:
        made_by, metadata = manifest.fingerprint, manifest.metadata
        if MADE_OF in metadata or metadata.get("source") in unreadable:
            return False  # a context is deleted with the items that it holds
        return made_by is not None and memory.engine.fingerprint.matches(made_by) and comes_from(manifest, path)

    return made_here


def _report(
    facts: dict[str, Any], line: str, diff: SyncDiff, reading: Reading, memory: KVCacheMemory, as_json: bool
) -> None:
    place: Path | None = getattr(memory.store, "path", None)
    if as_json:
        skipped = [{"path": path, "reason": reason} for path, reason in reading.skipped]
        output.emit({**facts, "store": place, "ids": list(diff.wanted), "skipped": skipped})
    else:
        typer.echo(f"{line}; in {place}" if place else line)
