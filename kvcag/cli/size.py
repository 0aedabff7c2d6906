"""`kvcag size`: bytes of keys and values, from a model's configuration."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated

import typer

from kvcag.cli import common
from kvcag.cli.common import Json, Model
from kvcag.sizing import BreakEven, break_even, kv_geometry
from kvcag.stores.files import WORTH_STORING


def size(
    model: Model = None,
    tokens: Annotated[int, typer.Option(min=1, help="Size documents of this many tokens.")] = 1000,
    documents: Annotated[int, typer.Option(min=1, help="Size this many documents.")] = 1,
    instruction: Annotated[
        int, typer.Option("--instruction-tokens", min=0, help="Size an instruction of this many tokens, stored once.")
    ] = 0,
    dtype: Annotated[
        str, typer.Option(help="Use float32, float16 or bfloat16; auto is the checkpoint's dtype.")
    ] = "auto",
    prefill: Annotated[
        float | None,
        typer.Option(
            "--prefill-tokens-per-s",
            help="Assume this speed of encoding, in tokens per second. Default: do not compare times.",
        ),
    ] = None,
    load: Annotated[
        float | None,
        typer.Option(
            "--load-bytes-per-s",
            help="Assume this speed of the store, in bytes per second, such as 3e9. Default: do not compare times.",
        ),
    ] = None,
    latency: Annotated[
        float, typer.Option("--latency-ms", min=0, help="Assume this latency of the store, in milliseconds.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Compute the size of caches, and whether loading them is faster than encoding. Loads no weights.

    For example:

        kvcag size --model Qwen/Qwen3-8B --tokens 6000 --documents 100

        kvcag size --model config.json --prefill-tokens-per-s 9000 --load-bytes-per-s 3e9 --latency-ms 0.2
    """
    if (prefill is None) != (load is None):
        raise typer.BadParameter("--prefill-tokens-per-s and --load-bytes-per-s go together: pass both, or neither")
    geometry = kv_geometry(model or common.resolve(None)[1])
    per_token = {"kept": geometry.bytes_per_token(dtype), "int8": geometry.bytes_per_token(dtype, int8=True)}
    stored_as, states = geometry.check_dtype(dtype), geometry.state_bytes + geometry.map_bytes
    totals = {name: (size * tokens + states) * documents for name, size in per_token.items()}
    if instruction >= WORTH_STORING:  # a shorter instruction is not stored; with int8, none is stored
        totals["kept"] += per_token["kept"] * instruction + states
    even = {}
    if prefill is not None and load is not None:
        even = {name: break_even(tokens, size, prefill, load, latency / 1000) for name, size in per_token.items()}
    if as_json:
        common.emit(
            {
                **asdict(geometry),
                "dtype": stored_as,
                "sliding_layers": geometry.sliding_layers,
                "tokens": tokens,
                "documents": documents,
                "bytes_per_token": per_token["kept"],
                "bytes_per_token_int8": per_token["int8"],
                "bytes": totals["kept"],
                "bytes_int8": totals["int8"],
                "computed_again_s": tokens / prefill if prefill else None,
                "break_even": {name: _finite({"load": made.load, **asdict(made)}) for name, made in even.items()},
            }
        )
        return
    console = common.stdout()
    if geometry.layers:
        first = geometry.layers[0]
        sharing = common.counted(geometry.attention_heads // first.kv_heads, "query head")
        console.print(
            f"{geometry.model}: {len(geometry.layers)} layers, {common.counted(first.kv_heads, 'KV head')} of "
            f"{first.key_dim} numbers ({sharing} for each)"
        )
    if states:
        console.print(f"recurrent layers: {common.size(states)} of states for each document, any length")
    if geometry.sliding_layers:
        console.print(f"{geometry.sliding_layers} layers have a sliding window; their caches keep all tokens too")
    labels = {"kept": stored_as, "int8": "int8 at rest"}
    rows = []
    for name, one in per_token.items():
        rows.append((labels[name], f"{one:,}", common.size(one * tokens + states), common.size(totals[name])))
    counted = common.counted(documents, "document") + (" and instruction" if instruction else "")
    amounts = f">{common.counted(tokens, 'token')}", f">{counted}"
    console.print(common.table(["dtype", ">bytes per token", *amounts], rows))
    for name, made in even.items():
        console.print(f"{labels[name]}: {_verdict(made)}")
    if prefill is not None:
        again, more = 1000 * tokens / prefill, common.size(per_token["kept"] * tokens)
        console.print(
            f"encoded in context: where a document comes first, it is computed again in {again:,.1f} ms, and takes "
            f"{more} more while it is a recent context"
        )
    common.then("encode PATH" if prefill else "bench")  # `bench` measures the speeds that this command assumes


def _finite(figures: dict[str, object]) -> dict[str, object]:
    """Return figures for JSON, which has no infinity."""
    return {name: None if value == math.inf else value for name, value in figures.items()}


def _verdict(made: BreakEven) -> str:
    chosen = "load" if made.load else "encode"
    times = f"loading takes {1000 * made.load_s:,.1f} ms, encoding {1000 * made.encode_s:,.1f} ms"
    if made.load:
        from_on = f"from {math.ceil(made.even_tokens):,} tokens" if made.even_tokens > 1 else "at any length"
        return f"{chosen}: {times}; loading is faster {from_on}"
    if math.isinf(made.even_bytes_per_s):
        return f"{chosen}: {times}; the latency alone takes longer"
    return f"{chosen}: {times}; loading is faster above {common.size(int(made.even_bytes_per_s))} per second"
