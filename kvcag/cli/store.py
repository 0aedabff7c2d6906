"""`kvcag verify` and `kvcag import-memos`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvcag.cli import output
from kvcag.cli.group import NEGATIVE, say
from kvcag.cli.options import Json, Model, Store, default_store
from kvcag.errors import InvalidInputError


def verify(
    path: Annotated[
        Path | None,
        typer.Argument(exists=True, help="A store, or a folder that dump wrote. Default: --store.", show_default=False),
    ] = None,
    store: Store = None,
    repair: Annotated[bool, typer.Option("--repair", help="Delete what is damaged or half written.")] = False,
    as_json: Json = False,
) -> None:
    """Read every stored item below a directory and compare every byte with its checksum.

    Exits with 1 if something is damaged or half written, and is still there.

    For example:

        kvcag verify

        kvcag verify --repair /var/lib/kv
    """
    from kvcag.stores.disk import VerifyReport
    from kvcag.stores.disk import verify as check

    folder = path or store or default_store()
    if path is None and store is not None and not store.exists():
        raise InvalidInputError(f"{store}: no such folder. Name the store's with --store.")
    report = check(folder, repair=repair) if folder.exists() else VerifyReport()
    if as_json:
        output.emit({"path": folder, "clean": report.clean, "repaired": repair, **asdict(report)})
    else:
        for file, reason in (*report.damaged, *report.foreign):
            typer.echo(f"{file}: {reason.removeprefix(f'{file} ')}")
        for file in report.abandoned:
            typer.echo(f"{file}: its writer died before it was done")
        found = {"damaged": len(report.damaged), "half written": len(report.abandoned)}
        bad = (f"{count} {what}{', deleted' if repair and count else ''}" for what, count in found.items())
        sound = f"{report.sound} items sound ({output.size(report.bytes)})"
        typer.echo(", ".join([sound, *bad, f"{len(report.foreign)} of other programs"]))
    if not (report.clean or repair):
        say("`kvcag verify --repair` deletes what is damaged; `kvcag encode` or `sync` encodes it again.")
        raise typer.Exit(NEGATIVE)


def import_memos(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What MemOS's KVCacheMemory.dump wrote.")],
    out: Annotated[Path, typer.Option("--out", file_okay=False, help="The folder for KVCacheMemory.load.")],
    model: Model = None,
    instruction: Annotated[str | None, typer.Option(help="The instruction that stands before the documents.")] = None,
    as_json: Json = False,
) -> None:
    """Take a dump of MemOS over, without running what is in it.

    Ids, metadata and texts are kept. The texts are encoded again: a dump does not say which model or which tokens its
    caches were made from, and each is wrapped in a system turn of its own.

    For example:

        kvcag import-memos memos.pickle --out kv/
    """
    from kvcag.stores.memos import read_memos_pickle

    items = read_memos_pickle(file)
    from kvcag.cli.loading import load_engine
    from kvcag.memory import KVCacheMemory

    memory = KVCacheMemory(load_engine(model), instruction=instruction)
    taken: list[dict[str, object]] = []
    with output.progress("encoding", len(items), "items") as advance:
        for old in items:
            new = memory.extract(old.records.text_memories or old.records.composed_text_memory)
            records = new.records.model_copy(update={"timestamp": old.records.timestamp})
            metadata = {**new.metadata, **old.metadata}
            memory.add(new.model_copy(update={"id": old.id, "metadata": metadata, "records": records}))
            taken.append({"id": old.id, "tokens": len(new.token_ids)})
            advance(1, old.id)
    memory.dump(out)
    if as_json:
        output.emit({"folder": out, "items": taken})
        return
    for each in taken:
        typer.echo(f"{each['id']}: {each['tokens']} tokens")
    typer.echo(f"{output.counted(len(taken), 'item')} in {out}")
