"""`kvcag ls`, `inspect`, `rm`, `purge`, `verify` and `import-memos`: show and manage the items of a store."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvcag.cli import common
from kvcag.cli.common import Json, Model, Namespace, Source, Store
from kvcag.errors import InvalidInputError

if TYPE_CHECKING:
    from kvcag.stores.base import DeletionReport

_EXCERPT = 400
_AGE = "Use only items that were encoded longer ago than this: 90s, 30m, 12h, 7d or 4w, for example. Default: any age."
_DUMP = "The folder of a store, or a folder that KVCacheMemory.dump wrote. Default: --store."


@dataclass(frozen=True, slots=True)
class Choosing:
    """Options of `ls` and `rm`: the store, and filters of its items."""

    store: Store = None
    namespace: Namespace = ""
    source: Source = None
    older_than: Annotated[str | None, typer.Option(metavar="AGE", help=_AGE)] = None
    as_json: Json = False


@common.takes(Choosing)
def ls(
    options: Choosing,
    sort: Annotated[
        Literal["age", "bytes", "source", "tokens"],
        typer.Option("--sort", help="Sort by age (newest first), bytes or tokens (largest first), or source."),
    ] = "age",
) -> None:
    """List the items of a store: id, source, number of tokens, size and age.

    For example:

        kvcag ls

        kvcag ls --source notes/ --older-than 30d --sort bytes

        kvcag ls --json | jq -r '.[].id'
    """
    from kvcag.cli.entries import choose, open_existing, read_entries

    entries, unreadable = read_entries(open_existing(options.store, options.namespace))
    chosen = choose(entries, options.source, options.older_than)
    if sort == "source":
        chosen.sort(key=lambda entry: entry.source)
    elif sort != "age":
        chosen.sort(key=lambda entry: -(entry.bytes if sort == "bytes" else entry.manifest.tokens))
    if options.as_json:
        common.emit([entry.row() for entry in chosen])
    elif chosen:
        columns, rows = ["id", "source", ">tokens", ">bytes", ">age"], [entry.cells() for entry in chosen]
        if len({entry.model for entry in chosen}) > 1:
            columns, rows = [*columns, "model"], [[*entry.cells(), entry.model] for entry in chosen]
        common.stdout().print(common.table(columns, rows))
    folder = options.store or str(common.default_store())
    total = f"{common.counted(len(chosen), 'item')}, {common.size(sum(entry.bytes for entry in chosen))} in {folder}"
    if len(chosen) < len(entries):
        total += f" ({len(entries)} without the filters)"
    common.echo(total, err=True)
    if not entries:
        common.say(f"there are no items yet{_elsewhere(folder, options.namespace)}.")
    if unreadable:
        common.say(f"{common.counted(unreadable, 'file')} cannot be read: `kvcag verify` lists damaged files.")
    if not options.as_json:
        common.then(f"inspect {chosen[0].short}" if chosen else "ls" if entries else "encode PATH")


def _elsewhere(place: str, namespace: str) -> str:
    """Say how many other namespaces the folder has. Their names are unknown, since folder names are hashes."""
    from kvcag.stores.files import Names

    own = Names(namespace).space
    others = [path for path in Path(place).glob("[0-9a-f]*") if len(path.name) == 32 and path.name != own]
    return f" in this namespace ({common.counted(len(others), 'other')} may have some)" if others else ""


def inspect(
    id: Annotated[str, typer.Argument(help="The id of an item, or a unique beginning of it.")],
    store: Store = None,
    namespace: Namespace = "",
    as_json: Json = False,
) -> None:
    """Show one item: its model, shape, dtype, records and text. Verifies all checksums.

    Exits with 1 if the item is missing or damaged.

    For example:

        kvcag inspect 3f9c

        kvcag inspect 3f9c --json | jq .fingerprint
    """
    from kvcag.cli.entries import find_one, open_existing

    opened = open_existing(store, namespace)
    entry = find_one(opened, id)
    assert opened is not None  # it has this entry
    opened.get(entry.id)  # verifies all checksums, and raises if one differs
    manifest, made_by = entry.manifest, entry.manifest.fingerprint
    _, kv_heads, head_dim = made_by.geometry.split("x") if made_by else ("", "?", "?")
    shown = {
        "id": entry.id,
        "file": str(opened.file(entry.id)),
        "bytes": entry.bytes,
        "encoded_at": manifest.records.timestamp.isoformat(),
        "layers": manifest.layers,
        "shape": f"(1, {kv_heads}, {manifest.tokens}, {head_dim})",
        "dtype": manifest.dtype,
        "at_rest": manifest.quantize or manifest.dtype,
        "exact": manifest.is_exact,
        "base_position": manifest.base_position,
        "prefix_digest": manifest.prefix_digest,
    }
    if as_json:
        common.emit({**shown, **manifest.model_dump(mode="json", exclude={"id", "dtype", "layers", "is_exact"})})
        return
    shown["bytes"] = common.size(entry.bytes)
    shown["encoded_at"] = f"{shown['encoded_at']} ({common.age(entry.encoded_at)} ago)"
    shown["checksums"] = f"all {len(manifest.checksums)} match"
    shown |= {f"model.{field}": value for field, value in (made_by.model_dump() if made_by else {}).items()}
    shown |= {f"metadata.{field}": value for field, value in manifest.metadata.items() if field != "source_text"}
    text = entry.text.strip()
    lines = [f"{field:<22} {value}" for field, value in shown.items()]
    lines += [f"\n{text[:_EXCERPT]}{' …' if len(text) > _EXCERPT else ''}"] if text else []
    common.stdout().print("\n".join(lines), soft_wrap=True)
    common.then(common.ASK + (f" --id {entry.short}" if entry.is_document else ""))


@common.takes(Choosing)
def rm(
    options: Choosing,
    ids: Annotated[
        list[str] | None, typer.Argument(help="Ids, or unique beginnings of ids.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete every item of this namespace.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete items, and the contexts that contain them. Asks first if it would delete more items than you named.

    For example:

        kvcag rm 3f9c 81aa

        kvcag rm --source notes/old.md

        kvcag rm --older-than 30d --yes
    """
    from kvcag.cli.entries import choose, find, open_existing, read_entries, with_contexts

    if bool(ids) == bool(options.source or options.older_than or everything):
        raise InvalidInputError("pass either ids, or one of --source, --older-than and --all.")
    opened = open_existing(options.store, options.namespace)
    entries, unread = read_entries(opened)
    chosen = find(entries, ids) if ids else choose(entries, options.source, options.older_than)
    if opened is None or not (chosen or (everything and unread)):
        common.say("no item matches: nothing was deleted.")
        common.then("ls")
        raise typer.Exit(common.NEGATIVE)
    deleted = with_contexts(entries, chosen)
    held = sum(entry.bytes for entry in deleted)
    what = common.counted(len(deleted), "item")
    if len(deleted) > max(1, len(ids or [])) and not yes:
        if not sys.stdin.isatty():
            raise InvalidInputError(f"this would delete {what}, {common.size(held)}. Pass --yes to confirm.")
        if not typer.confirm(f"Delete {what}, {common.size(held)}?", err=True):
            common.say("nothing was deleted.")
            raise typer.Exit(common.NEGATIVE)
    report = opened.clear() if everything else opened.erase([entry.id for entry in deleted])
    if options.as_json:
        common.emit({"deleted": report.ids, "bytes": held, "failed": report.failed})
    else:
        common.echo(f"{common.counted(len(report.ids), 'item')} deleted, {common.size(held)}")
        common.then("ls")
    _say_failed(report, unread if options.source else 0, exit_code=common.FAILED)


def _say_failed(report: DeletionReport, unread: int = 0, exit_code: int = common.NEGATIVE) -> None:
    """Print each item that could not be deleted, and exit if there is one."""
    for what, why in report.failed.items():
        common.say(f"{what} was not deleted: {why}")
    if unread:
        common.say(f"{common.counted(unread, 'file')} cannot be read and may hold the text: `kvcag verify` lists them.")
    if report.failed or unread:
        raise typer.Exit(exit_code if report.failed else common.NEGATIVE)


def purge(
    source: Annotated[str, typer.Argument(metavar="TEXT", help="The text, or its source: a path, a URL, an id.")],
    store: Store = None,
    namespace: Namespace = "",
    dump: Annotated[
        list[str] | None,
        typer.Option("--dump", metavar="FOLDER", help="Also delete the text from this dump; repeatable."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", metavar="FILE", help="Also delete the text from this state file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Delete everything made from a text: its items, larger items that contain it, and its copies in dumps.

    If an item cannot be read or deleted, the command prints its name and deletes the others. Exits with 1 in that case,
    and if nothing was found.

    For example:

        kvcag purge notes/ada.md

        kvcag purge "Ada's password is swordfish." --dump backup/ --json | jq .failed
    """
    from kvcag.cli.entries import open_existing
    from kvcag.stores.base import DeletionReport

    opened = open_existing(store, namespace)
    names = dict.fromkeys([source, os.path.abspath(source)]) if os.path.exists(source) else [source]
    report = DeletionReport()
    for name in names:
        report += opened.purge(name) if opened is not None else DeletionReport()
        for folder in dump or ():
            from kvcag.stores.dump import purge_dump

            report += purge_dump(folder, name)
        if scheduler is not None:
            report += _forget_texts(scheduler, name)
    if as_json:
        common.emit(report.as_dict())
    else:
        found = ((place, len(ids)) for place, ids in report.deleted.items() if ids)
        common.echo("\n".join(f"{common.counted(count, 'item')} deleted from {place}" for place, count in found))
        if report:
            common.then("ls")
    if not report:
        common.say("nothing was made from this text: nothing was deleted.")
        common.then("ls")
        raise typer.Exit(common.NEGATIVE)
    _say_failed(report)


def _forget_texts(path: str, source: str) -> DeletionReport:
    """Delete a text from the state of a scheduler that is not running."""
    from kvcag.errors import SchedulerStateError
    from kvcag.scheduler.texts import Texts, read_texts
    from kvcag.stores.base import DeletionReport

    try:
        before = len(read_texts(path))
        with contextlib.closing(Texts(path, "")) as texts:
            texts.purge({source})
    except SchedulerStateError as error:
        return DeletionReport({}, {path: str(error)})
    gone = before - len(read_texts(path))
    return DeletionReport({path: [f"text {number}" for number in range(1, gone + 1)]})


def verify(
    path: Annotated[Path | None, typer.Argument(exists=True, help=_DUMP, show_default=False)] = None,
    store: Store = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete damaged items and the leftovers of killed writers.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every item below a folder, and compare all bytes with their checksums.

    Lists the files that --repair would delete, and exits with 1 if there are any. Never deletes other programs' files.

    For example:

        kvcag verify

        kvcag verify --repair /var/lib/kv
    """
    from kvcag.stores.verify import VerifyReport
    from kvcag.stores.verify import verify as check

    if path is None and store is not None and "://" in store:
        raise InvalidInputError(f"{store}: verify reads folders. Every item of a remote is verified when it is used.")
    folder = path or Path(store or common.default_store())
    if path is None and not folder.exists() and store is not None:
        raise InvalidInputError(f"{store}: no such folder. Pass the store's folder with --store.")
    report = check(folder, repair=repair) if folder.exists() else VerifyReport()
    if as_json:
        common.emit({"path": folder, "clean": report.clean, "repaired": repair, **asdict(report)})
    else:
        killed = "left by a writer that was killed"
        deleted = [*report.damaged, *((file, killed) for file in report.abandoned)]
        for files, becomes in (
            (deleted, "deleted" if repair else "--repair deletes it"),
            (report.foreign, "left alone"),
        ):
            for file, reason in files:
                common.echo(f"{file}: {reason.removeprefix(f'{file} ').rstrip('.')}: {becomes}")
        found = {"damaged": len(report.damaged), "half written": len(report.abandoned)}
        bad = (f"{count} {what}{', deleted' if repair and count else ''}" for what, count in found.items())
        sound = f"{report.sound} items sound ({common.size(report.bytes)})"
        common.echo(", ".join([sound, *bad, f"{len(report.foreign)} of other programs"]))
    is_left = not (report.clean or repair)
    if is_left:
        common.say("nothing was deleted. After --repair, `kvcag encode` or `sync` encodes the texts again.")
    if not as_json:
        repairing = f"verify{common.paths([str(path)] if path else None)} --repair"
        common.then("ls" if report.clean else repairing if is_left else "encode PATH")
    if is_left:
        raise typer.Exit(common.NEGATIVE)


def import_memos(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A file that MemOS's KVCacheMemory.dump wrote.")
    ],
    out: Annotated[Path, typer.Option("--out", file_okay=False, help="Write a folder for KVCacheMemory.load.")],
    model: Model = None,
    instruction: Annotated[
        str | None, typer.Option(help="Put this instruction before the documents. Default: none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a dump of MemOS to a kvcag dump, without running code that the file may contain.

    Keeps ids, metadata and texts, and encodes the texts again, since a MemOS dump does not record the model or the
    tokens of its caches.

    For example:

        kvcag import-memos memos.pickle --out kv/
    """
    from kvcag.stores.memos import read_memos_pickle

    items = read_memos_pickle(file)
    engine = common.load_engine(model)
    from kvcag.memory import KVCacheMemory

    memory = KVCacheMemory(engine, instruction=instruction)
    converted: list[dict[str, object]] = []
    with common.progress("encoding", len(items), "items") as advance:
        for old in items:
            new = memory.extract(old.records.text_memories or old.records.composed_text_memory)
            records = new.records.model_copy(update={"timestamp": old.records.timestamp})
            metadata = {**new.metadata, **old.metadata}
            memory.add(new.model_copy(update={"id": old.id, "metadata": metadata, "records": records}))
            converted.append({"id": old.id, "tokens": len(new.token_ids)})
            advance(1, old.id)
    memory.dump(out)
    if as_json:
        common.emit({"folder": out, "items": converted})
        return
    for each in converted:
        common.echo(f"{each['id']}: {each['tokens']} tokens")
    common.echo(f"{common.counted(len(converted), 'item')} in {out}")
    common.say(f"next: KVCacheMemory(engine).load({str(out)!r})")
