"""`kvcag size`: bytes of keys and values, from a model's configuration."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated

import typer

from kvcag.cli import output
from kvcag.cli.options import Json, Model, resolve
from kvcag.sizing import BreakEven, KVGeometry, break_even, kv_geometry


def size(
    model: Model = None,
    tokens: Annotated[int, typer.Option(min=1, help="Size documents of this many tokens.")] = 1000,
    documents: Annotated[int, typer.Option(min=1, help="Size this many documents.")] = 1,
    dtype: Annotated[str, typer.Option(help="Use float32, float16 or bfloat16; auto is the checkpoint's.")] = "auto",
    prefill: Annotated[
        float | None, typer.Option("--prefill-tokens-per-s", help="Assume this speed of encoding.")
    ] = None,
    load: Annotated[
        float | None, typer.Option("--load-bytes-per-s", help="Assume this speed of the store, such as 3e9.")
    ] = None,
    latency: Annotated[float, typer.Option("--latency-ms", min=0, help="Assume this latency of the store.")] = 0.0,
    json: Json = False,
) -> None:
    """Compute the bytes of keys and values, and when loading is faster than encoding. Loads no weights.

    For example:

        kvcag size --model Qwen/Qwen3-8B --tokens 6000 --documents 100

        kvcag size --model config.json --prefill-tokens-per-s 9000 --load-bytes-per-s 3e9 --latency-ms 0.2
    """
    if (prefill is None) != (load is None):
        raise typer.BadParameter("--prefill-tokens-per-s and --load-bytes-per-s go together: pass both, or neither")
    geometry = kv_geometry(model or resolve(None)[1])
    per_token = {"kept": geometry.bytes_per_token(dtype), "int8": geometry.bytes_per_token(dtype, int8=True)}
    even = {}
    if prefill is not None and load is not None:
        even = {name: break_even(tokens, size, prefill, load, latency / 1000) for name, size in per_token.items()}
    if json:
        output.emit(_described(geometry, geometry.check_dtype(dtype), tokens, documents, per_token, even))
    else:
        _show(geometry, geometry.check_dtype(dtype), tokens, documents, per_token, even)


def _described(
    geometry: KVGeometry, dtype: str, tokens: int, documents: int, per_token: dict[str, int], even: dict[str, BreakEven]
) -> dict[str, object]:
    """Return the figures for `--json`; infinity is null."""
    return {
        **asdict(geometry),
        "dtype": dtype,
        "sliding_layers": geometry.sliding_layers,
        "tokens": tokens,
        "documents": documents,
        "bytes_per_token": per_token["kept"],
        "bytes_per_token_int8": per_token["int8"],
        "bytes": per_token["kept"] * tokens * documents,
        "bytes_int8": per_token["int8"] * tokens * documents,
        "break_even": {
            name: {
                "load": made.load,
                **{field: value if math.isfinite(value) else None for field, value in asdict(made).items()},
            }
            for name, made in even.items()
        },
    }


def _show(
    geometry: KVGeometry, dtype: str, tokens: int, documents: int, per_token: dict[str, int], even: dict[str, BreakEven]
) -> None:
    console = output.stdout()
    first = geometry.layers[0]
    sharing = geometry.attention_heads // first.kv_heads
    console.print(
        f"{geometry.model}: {len(geometry.layers)} layers, {output.counted(first.kv_heads, 'KV head')} of "
        f"{first.key_dim} numbers ({output.counted(sharing, 'query head')} for each)"
    )
    if geometry.sliding_layers:
        console.print(f"{geometry.sliding_layers} layers have a sliding window; their caches keep all tokens too")
    rows = []
    for name, label in (("kept", dtype), ("int8", "int8 at rest")):
        one = per_token[name] * tokens
        rows.append((label, f"{per_token[name]:,}", output.size(one), output.size(one * documents)))
    columns = ("bytes per token", f"{output.counted(tokens, 'token')}", output.counted(documents, "document"))
    console.print(output.table({"dtype": "left", **dict.fromkeys(columns, "right")}, rows))
    for name, made in even.items():
        console.print(f"{dtype if name == 'kept' else 'int8 at rest'}: {_verdict(made)}")


def _verdict(made: BreakEven) -> str:
    chosen = "load" if made.load else "encode"
    times = f"loading takes {1000 * made.load_s:,.1f} ms, encoding {1000 * made.encode_s:,.1f} ms"
    if made.load:
        from_on = f"from {math.ceil(made.even_tokens):,} tokens" if made.even_tokens > 1 else "at any length"
        return f"{chosen}: {times}; loading is faster {from_on}"
    if math.isinf(made.even_bytes_per_s):
        return f"{chosen}: {times}; the latency alone takes longer"
    return f"{chosen}: {times}; loading is faster above {output.size(int(made.even_bytes_per_s))} per second"
