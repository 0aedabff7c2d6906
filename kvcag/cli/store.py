"""`kvcag verify` and `kvcag import-memos`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    path: Annotated[Path, typer.Argument(exists=True, help="A store's directory, or a folder that dump wrote.")],
    repair: Annotated[bool, typer.Option("--repair", help="Delete what is damaged or half written.")] = False,
) -> None:
    """Read every stored item below a directory and compare every byte with its checksum.

    Exits with 1 if something is damaged or half written, and is still there.
    """
    from kvcag.stores.verification import verify as check

    report = check(path, repair=repair)
    for file, reason in (*report.damaged, *report.foreign):
        typer.echo(f"{file}: {reason.removeprefix(f'{file} ')}")
    for file in report.abandoned:
        typer.echo(f"{file}: its writer died before it was done")
    done = ", deleted" if repair else ""
    typer.echo(
        f"{report.sound} items sound ({report.bytes / 1e6:.1f} MB), {len(report.damaged)} damaged{done}, "
        f"{len(report.abandoned)} half written{done}, {len(report.foreign)} of other programs"
    )
    if not (report.clean or repair):
        raise typer.Exit(1)


def import_memos(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What MemOS's KVCacheMemory.dump wrote.")],
    out: Annotated[Path, typer.Option("--out", file_okay=False, help="The folder for KVCacheMemory.load.")],
    model: Annotated[
        str | None, typer.Option(help="A hub id or a folder: the model that shall use them. Default: the embedded one.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="The instruction that stands before the documents.")] = None,
) -> None:
    """Take a dump of MemOS over, without running what is in it.

    Ids, metadata and texts are kept. The texts are encoded again: a dump does not say which model or which tokens its
    caches were made from, and each is wrapped in a system turn of its own.
    """
    from kvcag.stores.memos import read_memos_pickle

    items = read_memos_pickle(file)
    from kvcag.demo.model import embedded_model
    from kvcag.engines.hf import HFEngine
    from kvcag.memory import KVCacheMemory

    memory = KVCacheMemory(HFEngine.from_pretrained(model or str(embedded_model())), head=head)
    for old in items:
        new = memory.extract(old.records.text_memories or old.records.composed_text_memory)
        records = new.records.model_copy(update={"timestamp": old.records.timestamp})
        memory.add(
            new.model_copy(update={"id": old.id, "metadata": {**new.metadata, **old.metadata}, "records": records})
        )
        typer.echo(f"{old.id}: {len(new.token_ids)} tokens")
    memory.dump(out)
    typer.echo(f"{len(items)} items in {out}")
