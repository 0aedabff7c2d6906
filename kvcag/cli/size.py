"""`kvcag size`."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated

import typer

from kvcag.cli import output
from kvcag.cli.options import Json, Model
from kvcag.sizing import BreakEven, KVGeometry, break_even, kv_geometry


def size(
    model: Model = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one document.")] = 1000,
    documents: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16. auto: the checkpoint's own.")] = "auto",
    prefill: Annotated[
        float | None, typer.Option("--prefill-tokens-per-s", help="How quickly the model encodes on its device.")
    ] = None,
    load: Annotated[
        float | None, typer.Option("--load-bytes-per-s", help="How quickly the store gives bytes, as 3e9.")
    ] = None,
    latency: Annotated[float, typer.Option("--latency-ms", min=0, help="Before the store's first byte.")] = 0.0,
    json: Json = False,
) -> None:
    """How many bytes keys and values take, and when loading them is quicker than encoding. Loads no weights.

    For example:

        kvcag size --model Qwen/Qwen3-8B --tokens 6000 --documents 100

        kvcag size --model config.json --prefill-tokens-per-s 9000 --load-bytes-per-s 3e9 --latency-ms 0.2
    """
    if (prefill is None) != (load is None):
        raise typer.BadParameter("--prefill-tokens-per-s and --load-bytes-per-s belong together: pass both, or neither")
    geometry = kv_geometry(model or _embedded())
    per_token = {"kept": geometry.bytes_per_token(dtype), "int8": geometry.bytes_per_token(dtype, int8=True)}
    even = {}
    if prefill is not None and load is not None:
        even = {name: break_even(tokens, size, prefill, load, latency / 1000) for name, size in per_token.items()}
    if json:
        output.emit(_described(geometry, geometry.check_dtype(dtype), tokens, documents, per_token, even))
    else:
        _show(geometry, geometry.check_dtype(dtype), tokens, documents, per_token, even)


def _embedded() -> str:
    from kvcag.cli.loading import resolve

    return resolve(None)[1]


def _described(
    geometry: KVGeometry, dtype: str, tokens: int, documents: int, per_token: dict[str, int], even: dict[str, BreakEven]
) -> dict[str, object]:
    """For `--json`. What is infinite is null."""
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
        f"{geometry.model}: {len(geometry.layers)} layers, {output.counted(first.kv_heads, 'KV instruction')} of "
        f"{first.key_dim} numbers ({output.counted(sharing, 'query instruction')} to each)"
    )
    if geometry.sliding_layers:
        console.print(
            f"{geometry.sliding_layers} layers have a sliding window; caches here keep all tokens of them too"
        )
    rows = []
    for name, label in (("kept", dtype), ("int8", "int8 at rest")):
        one = per_token[name] * tokens
        rows.append((label, f"{per_token[name]:,}", output.size(one), output.size(one * documents)))
    columns = ("bytes a token", f"{output.counted(tokens, 'token')}", output.counted(documents, "document"))
    console.print(output.table({"kept as": "left", **dict.fromkeys(columns, "right")}, rows))
    for name, made in even.items():
        console.print(f"{dtype if name == 'kept' else 'int8 at rest'}: {_verdict(made)}")


def _verdict(made: BreakEven) -> str:
    chosen = "load" if made.load else "encode"
    times = f"loading takes {1000 * made.load_s:,.1f} ms, encoding {1000 * made.encode_s:,.1f} ms"
    if made.load:
        from_on = f"from {math.ceil(made.even_tokens):,} tokens on" if made.even_tokens > 1 else "at any length"
        return f"{chosen}: {times}; loading is quicker {from_on}"
    if math.isinf(made.even_bytes_per_s):
        return f"{chosen}: {times}; the latency alone is longer"
    return f"{chosen}: {times}; loading is quicker above {output.size(int(made.even_bytes_per_s))} a second"
