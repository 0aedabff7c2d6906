"""`kvcag encode` and `kvcag sync`: encode files into a store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvcag.cli import common
from kvcag.cli.common import INSTRUCTION, Instruction, Json, Model, Namespace, Store
from kvcag.errors import InvalidInputError

if TYPE_CHECKING:
    from kvcag.cli.entries import Entry
    from kvcag.cli.files import Reading, Text
    from kvcag.memory import KVCacheMemory
    from kvcag.stores.base import KVStore
    from kvcag.stores.files import Manifest
    from kvcag.sync import SyncDiff

_SPLIT = "Cut files into items of at most this many tokens. Default: one item per file."
_CONTEXT = (
    "Encode each item after the previous item of its file, which makes merged answers more faithful. Default: encode "
    "each item alone."
)
_SHARD = (
    "Encode only this part of the corpus: 3/64 is the third of 64 parts. Any machine may encode any part, also twice. "
    "Default: everything."
)


@dataclass(frozen=True, slots=True)
class Encoding:
    """Options of `encode` and `sync`."""

    model: Model = None
    store: Store = None
    namespace: Namespace = ""
    instruction: Instruction = INSTRUCTION
    split: Annotated[int | None, typer.Option("--split", min=16, metavar="TOKENS", help=_SPLIT)] = None
    context: Annotated[Literal["previous"] | None, typer.Option("--context", help=_CONTEXT)] = None
    as_json: Json = False

    def open(self) -> KVStore:
        """Open the store. Creates a missing folder."""
        from kvcag.cli.entries import open_store

        return open_store(self.store, self.namespace)

    def memory(self, store: KVStore) -> KVCacheMemory:
        """Load the model. Call `open` first: a store that fails does so at once, while loading takes seconds."""
        engine = common.load_engine(self.model)
        from kvcag.memory import KVCacheMemory

        return KVCacheMemory(engine, store, self.instruction, namespace=self.namespace)


@common.takes(Encoding)
def encode(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files, folders or globs of UTF-8 text.")],
    options: Encoding,
    shard: Annotated[str | None, typer.Option("--shard", metavar="I/N", help=_SHARD)] = None,
) -> None:
    """Encode files and store their caches, one item per file. Items that are stored already are not encoded again.

    In folders, .txt, .text, .md, .markdown, .rst and .jsonl files are read; with the extra `files`, also .pdf, .html
    and .docx. Each line of a .jsonl file is an item: an object with a string "text". If a run is interrupted, its
    finished items stay stored; run the command again to continue.
    With --shard, many machines can encode one corpus into one store, without a coordinator.

    For example:

        kvcag encode notes/ README.md 'docs/**/*.rst'

        kvcag encode book.txt --split 1024

        kvcag encode notes/ --json | jq .encoded

        kvcag encode corpus.jsonl --store s3://bucket/kv --shard 3/64
    """
    from kvcag.cli.files import Shard, read_texts

    if shard and options.context:
        raise InvalidInputError("pass either --shard or --context: the previous item may be in another shard.")
    reading = read_texts(paths, shard=Shard.parse(shard) if shard else None)
    memory = options.memory(options.open())
    diff = _diff(memory, reading, options.split, context=options.context)
    encoded, tokens = _encode(memory, diff)
    done = {"encoded": encoded, "kept": len(diff.wanted) - encoded, "tokens": tokens}
    line = f"{common.counted(done['encoded'], 'item')} encoded ({done['tokens']:,} tokens), {done['kept']} kept already"
    _report(done, line, diff, reading, memory, options)


@common.takes(Encoding)
def sync(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file or a folder.")],
    options: Encoding,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the changes without making them.")] = False,
) -> None:
    """Update the items of a file or folder: encode new and changed texts, and delete the items of removed ones.

    Only items that this model made from this path are deleted.

    For example:

        kvcag sync notes/ --dry-run

        kvcag sync notes/
    """
    from kvcag.cli.entries import open_existing, read_entries, with_contexts
    from kvcag.cli.files import read_texts
    from kvcag.stores.memory import MemoryStore

    reading = read_texts([path], may_be_empty=True)
    store: KVStore | None = None
    if not dry_run:
        store = options.open()
    elif options.store is None or "://" in options.store or os.path.isdir(options.store):
        store = open_existing(options.store, options.namespace)
    memory = options.memory(store or MemoryStore())
    diff = _diff(memory, reading, options.split, _made_here(memory, path, reading.unreadable), options.context)
    encoded, tokens = (len(diff.new), 0) if dry_run else _encode(memory, diff)
    if diff.gone and not dry_run:
        entries, _ = read_entries(store)
        gone = [entry for entry in entries if entry.id in set(diff.gone)]
        memory.store.delete(entry.id for entry in with_contexts(entries, gone))
    done = {"encoded": encoded, "kept": len(diff.wanted) - encoded, "dropped": len(diff.gone)}
    line = ", ".join(f"{count} {verb}" for verb, count in done.items())
    facts = {**done, "tokens": tokens, "dry_run": dry_run}
    again = f"sync{common.paths([path])}" if dry_run and (diff.new or diff.gone) else common.ASK
    _report(facts, f"would be: {line}" if dry_run else line, diff, reading, memory, options, again)


def bring(memory: KVCacheMemory, reading: Reading, kept: Sequence[Entry]) -> tuple[dict[str, Any], int]:
    """Encode new and changed texts. Cuts a long text, unless it is stored as one item or in other parts.

    Args:
        memory: the model and the store.
        reading: the texts.
        kept: the items of the store.

    Returns:
        The items by id, and the number of items that were encoded.
    """
    diff = _diff(memory, reading, None, cut_long=True, kept=kept)
    return diff.wanted, _encode(memory, diff)[0]


def _pieces(
    memory: KVCacheMemory, text: Text, limit: int | None, cut_long: bool, kept: Mapping[str, Sequence[Text]]
) -> list[Text]:
    """Divide a text into items.

    With a `limit`, cut by it. Otherwise divide the text as it is stored already. A text that is not stored is one item;
    if it is long and `cut_long` is True, cut it.
    """
    from kvcag.chat_template import segment
    from kvcag.cli.files import split

    template, head_ids = memory.engine.template, memory.engine.template.instruction_ids(memory.instruction)
    tokens = template.encode_text(segment(text.text))
    part_length = memory.engine.context_length // 8

    def count(part: str) -> int:
        return len(template.encode_text(part))

    def is_kept(part: Text) -> bool:
        return memory.documents.contains(head_ids, template.encode_text(segment(part.text)))

    if limit is not None:
        return split(text, limit, count)
    parts = list(kept.get(text.metadata["source"], ()))
    in_parts = bool(parts) and " ".join(part.text for part in parts).split() == text.text.split()
    if len(tokens) <= 2 * part_length and not in_parts:
        return [text]
    if is_kept(text):
        return [text]
    if in_parts:
        return parts
    parts = split(text, part_length, count)
    return parts if cut_long or all(map(is_kept, parts)) else [text]


def _parts_of(memory: KVCacheMemory, entries: Sequence[Entry]) -> dict[str, list[Text]]:
    """By source, the stored parts of a file in order. Files with missing parts are left out."""
    from kvcag.cli.entries import made_by
    from kvcag.cli.files import Text

    found: dict[str, dict[int, Text]] = {}
    for entry in entries:
        about = entry.manifest.metadata
        if "parts" in about and made_by(memory.engine, entry.manifest):
            about = {name: about[name] for name in ("source", "title", "part", "parts") if name in about}
            found.setdefault(str(about.get("source")), {})[int(about["part"])] = Text(entry.text, about)
    return {
        source: [parts[number] for number in sorted(parts)]
        for source, parts in found.items()
        if all(text.metadata["parts"] == len(parts) for text in parts.values())
    }


def _diff(
    memory: KVCacheMemory,
    reading: Reading,
    limit: int | None,
    is_mine: Callable[[Manifest], bool] | None = None,
    context: str | None = None,
    *,
    cut_long: bool = False,
    kept: Sequence[Entry] = (),
) -> SyncDiff:
    """Compare the texts with the store.

    Raises:
        InvalidInputError: a text exceeds the model's context. Nothing was encoded.
    """
    from kvcag.chat_template import segment
    from kvcag.contexts import Read
    from kvcag.sync import diff, in_context

    memory.documents.check_context(context)
    template = memory.engine.template
    head_ids = template.instruction_ids(memory.instruction)
    room = memory.engine.context_length - len(head_ids)
    read = []
    known = _parts_of(memory, kept)
    for text in reading.texts:
        for piece in _pieces(memory, text, limit, cut_long, known):
            token_ids = template.encode_text(segment(piece.text))
            if len(token_ids) > room:
                raise InvalidInputError(
                    f"{piece.metadata['source']} has {len(token_ids):,} tokens, but the model's context holds {room:,} "
                    f"after the instruction. Cut it with --split {max(16, room // 8)}."
                )
            read.append(Read(token_ids, piece.text, piece.metadata))
    return diff(memory.documents, head_ids, in_context(read, context), is_mine)


def _encode(memory: KVCacheMemory, diff: SyncDiff) -> tuple[int, int]:
    """Encode and store new texts. Returns the number of encoded items and of their tokens."""
    from kvcag.contexts import with_names

    documents, head_ids = memory.documents, memory.engine.template.instruction_ids(memory.instruction)
    total = sum(len(diff.wanted[key][0]) for key in diff.new)
    encoded = tokens = 0
    try:
        with documents.instruction(head_ids if total else ()), common.progress("encoding", total, "tokens") as advance:
            for key in diff.new:
                token_ids, text, metadata, behind = diff.wanted[key]
                advance(0, os.path.basename(metadata["source"]))
                if documents.contains(head_ids, token_ids, behind):  # another process was faster
                    advance(len(token_ids))
                    continue
                began = time.perf_counter()
                with documents.keeping(token_ids, text, with_names(metadata, behind)):
                    item = documents.encode(head_ids, token_ids, text, metadata, behind)
                    item.metadata[common.ENCODING_S] = round(time.perf_counter() - began, 3)
                    documents.put(item)
                encoded, tokens = encoded + 1, tokens + len(token_ids)
                advance(len(token_ids))
    except KeyboardInterrupt:
        kept, new = sum(map(documents.store.contains, diff.new)), common.counted(len(diff.new), "item")
        common.say(f"{kept} of {new} encoded and stored; run the command again to continue.")
        raise
    return encoded, tokens


def _made_here(memory: KVCacheMemory, path: str, unreadable: set[str]) -> Callable[[Manifest], bool]:
    """Return a predicate for items of this path and model. It is False for files that cannot be read now."""
    from kvcag.cli.entries import comes_from, made_by
    from kvcag.stores.base import MADE_OF

    def made_here(manifest: Manifest) -> bool:
        if MADE_OF in manifest.metadata or manifest.metadata.get("source") in unreadable:
            return False  # `with_contexts` deletes a context together with its items
        return made_by(memory.engine, manifest) and comes_from(manifest, path)

    return made_here


def _report(
    facts: dict[str, Any],
    line: str,
    diff: SyncDiff,
    reading: Reading,
    memory: KVCacheMemory,
    options: Encoding,
    following: str = common.ASK,
) -> None:
    from kvcag.stores.disk import DiskStore

    store = memory.store
    place = getattr(store, "path", None) or getattr(store, "url", None)
    if isinstance(store, DiskStore) and store.evictions:
        room = common.size(store.max_bytes or 0)
        common.say(f"{common.counted(store.evictions, 'item')} evicted: the store's budget is {room}.")
    if options.as_json:
        skipped = [{"path": path, "reason": reason} for path, reason in reading.skipped]
        common.emit({**facts, "store": place, "ids": list(diff.wanted), "skipped": skipped})
    else:
        common.echo(f"{line}; in {place}" if place else line)
        common.then(following)
