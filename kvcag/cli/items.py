"""`kvcag ls`, `kvcag inspect` and `kvcag rm`: what is kept, without loading a model."""

from __future__ import annotations

import sys
from enum import Enum
from typing import Annotated, Any

import typer

from kvcag.cli import output
from kvcag.cli.group import NEGATIVE, say
from kvcag.cli.options import Json, Namespace, OlderThan, Source, Store, default_store
from kvcag.errors import InvalidInputError

_EXCERPT = 400


class Order(str, Enum):
    """What `ls` sorts by."""

    age = "age"
    bytes = "bytes"
    source = "source"
    tokens = "tokens"


def ls(
    store: Store = None,
    namespace: Namespace = "",
    source: Source = None,
    older_than: OlderThan = None,
    sort: Annotated[Order, typer.Option("--sort", help="The newest, largest or first come first.")] = Order.age,
    as_json: Json = False,
) -> None:
    """List what is kept: id, source, tokens, bytes, age.

    For example:

        kvcag ls

        kvcag ls --source notes/ --older-than 30d --sort bytes

        kvcag ls --json | jq -r '.[].id'
    """
    from kvcag.cli.entries import choose, open_existing, read_entries

    entries, unreadable = read_entries(open_existing(store, namespace))
    chosen = choose(entries, source, older_than)
    if sort is Order.source:
        chosen.sort(key=lambda entry: entry.source)
    elif sort is not Order.age:
        chosen.sort(key=lambda entry: -(entry.bytes if sort is Order.bytes else entry.manifest.tokens))
    folder = store or default_store()
    if as_json:
        output.emit([entry.row() for entry in chosen])
    elif chosen:
        several = len({entry.model for entry in chosen}) > 1
        columns = {"id": "", "source": "", "tokens": "right", "bytes": "right", "age": "right"}
        rows = [_cells(entry, several) for entry in chosen]
        output.stdout().print(output.table({**columns, **({"model": ""} if several else {})}, rows))
    total = f"{output.counted(len(chosen), 'item')}, {output.size(sum(entry.bytes for entry in chosen))} in {folder}"
    if len(chosen) < len(entries):
        total += f" ({len(entries)} without the filters)"
    typer.echo(total, err=True)
    if not entries:
        say(f"nothing is kept here yet{_elsewhere(folder, namespace)}. `kvcag encode PATH` keeps what it encodes.")
    if unreadable:
        say(f"{output.counted(unreadable, 'file')} cannot be read: `kvcag verify` names what is damaged.")


def _cells(entry: Any, with_model: bool) -> list[object]:
    cells = [entry.short, entry.source, f"{entry.manifest.tokens:,}", output.size(entry.bytes)]
    return [*cells, output.age(entry.encoded_at), *([entry.model] if with_model else [])]


def _elsewhere(folder: Any, namespace: str) -> str:
    """That other namespaces hold something, if so; their names cannot be told from their folders."""
    from kvcag.stores.files import Names

    own = Names(namespace).space
    others = [path for path in folder.glob("[0-9a-f]*") if len(path.name) == 32 and path.name != own]
    return f" in this namespace ({output.counted(len(others), 'other')} may hold something)" if others else ""


def inspect(
    id: Annotated[str, typer.Argument(help="An id, or as much of its beginning as is unique.")],
    store: Store = None,
    namespace: Namespace = "",
    as_json: Json = False,
) -> None:
    """Show one item: what made it, its shape and dtype, its records and text; every checksum is compared.

    Exits with 1 if there is no such item, or if it is damaged.

    For example:

        kvcag inspect 3f9c

        kvcag inspect 3f9c --json | jq .fingerprint
    """
    from kvcag.cli.entries import find, open_existing, read_entries

    opened = open_existing(store, namespace)
    entry = find(read_entries(opened)[0], [id])[0]
    assert opened is not None  # it has this entry
    opened.get(entry.id)  # compares every checksum
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
        output.emit({**shown, **manifest.model_dump(mode="json", exclude={"id", "dtype", "layers", "is_exact"})})
        return
    console = output.stdout()
    shown["bytes"] = output.size(entry.bytes)
    shown["encoded_at"] = f"{shown['encoded_at']} ({output.age(entry.encoded_at)} ago)"
    shown["checksums"] = f"all {len(manifest.checksums)} match"
    shown |= {f"model.{field}": value for field, value in (made_by.model_dump() if made_by else {}).items()}
    metadata = {field: value for field, value in manifest.metadata.items() if field != "source_text"}
    shown |= {f"metadata.{field}": value for field, value in metadata.items()}
    for field, value in shown.items():
        console.print(f"{field:<22} {value}", soft_wrap=True)
    text = manifest.records.composed_text_memory.strip()
    if text:
        console.print(f"\n{text[:_EXCERPT]}{' …' if len(text) > _EXCERPT else ''}", soft_wrap=True)


def rm(
    ids: Annotated[
        list[str] | None, typer.Argument(help="Ids, or unique beginnings of them.", show_default=False)
    ] = None,
    store: Store = None,
    namespace: Namespace = "",
    source: Source = None,
    older_than: OlderThan = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything in this namespace.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before several items are deleted.")] = False,
    as_json: Json = False,
) -> None:
    """Delete items, and the contexts that hold them. Asks before it deletes several.

    For example:

        kvcag rm 3f9c 81aa

        kvcag rm --source notes/old.md

        kvcag rm --older-than 30d --yes
    """
    from kvcag.cli.entries import choose, find, open_existing, read_entries, with_contexts

    filtered = bool(source or older_than or everything)
    if bool(ids) == filtered:
        raise InvalidInputError("name either ids, or what to delete with --source, --older-than or --all.")
    opened = open_existing(store, namespace)
    entries, _ = read_entries(opened)
    chosen = find(entries, ids) if ids else choose(entries, source, older_than)
    if not chosen or opened is None:
        say("nothing matches: nothing was deleted.")
        raise typer.Exit(NEGATIVE)
    leaving = with_contexts(entries, chosen)
    held = sum(entry.bytes for entry in leaving)
    if len(leaving) > 1 and not yes and len(leaving) > len(ids or []):
        _confirm(f"{output.counted(len(leaving), 'item')}, {output.size(held)}")
    opened.delete([entry.id for entry in leaving])
    if as_json:
        output.emit({"deleted": [entry.id for entry in leaving], "bytes": held})
    else:
        typer.echo(f"{output.counted(len(leaving), 'item')} deleted, {output.size(held)}")


def _confirm(what: str) -> None:
    """Ask a person; a script has to say --yes."""
    if not sys.stdin.isatty():
        raise InvalidInputError(f"this would delete {what}. Pass --yes to do it without being asked.")
    if not typer.confirm(f"Delete {what}?", err=True):
        say("nothing was deleted.")
        raise typer.Exit(NEGATIVE)
