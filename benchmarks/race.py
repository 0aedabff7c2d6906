"""Draws the README's animated picture from the report's figures: the first word with caches and without.

    python benchmarks/race.py [--tokens 4114] [--out docs/img/race.svg]

Bars run in real time. The picture needs no script: a browser animates it, and shows the end where animations are off.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from peers.ours import Exact
from peers.plain import FullPrefill

ROOT = Path(__file__).resolve().parents[1]
WIDTH, PAUSE = 520, 3.0
"""Pixels of the longer bar, and seconds for which the end is shown."""

PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 540 200" width="540" height="200" role="img" aria-label="{label}">
<style>
  text {{ font: 15px system-ui, sans-serif; fill: #57606a; }}
  .word {{ font-weight: 600; }}
  .track {{ fill: #57606a; opacity: .15; }}
  .full {{ fill: #d1495b; }} .ours {{ fill: #00a08a; }}
  @media (prefers-color-scheme: dark) {{ text {{ fill: #adbac7; }} }}
  @media (prefers-reduced-motion: no-preference) {{
    .run {{ transform-origin: 10px 0; animation: run {round:.2f}s linear infinite; }}
    .full.run {{ animation-name: full; }} .ours.run {{ animation-name: ours; }}
    .full.word {{ animation: fullword {round:.2f}s step-end infinite; }}
    .ours.word {{ animation: oursword {round:.2f}s step-end infinite; }}
  }}
  @keyframes full {{ 0% {{ transform: scaleX(0); }} {full_at:.2f}%, 100% {{ transform: scaleX(1); }} }}
  @keyframes ours {{ 0% {{ transform: scaleX(0); }} {ours_at:.2f}%, 100% {{ transform: scaleX(1); }} }}
  @keyframes fullword {{ 0% {{ opacity: 0; }} {full_at:.2f}%, 100% {{ opacity: 1; }} }}
  @keyframes oursword {{ 0% {{ opacity: 0; }} {ours_at:.2f}%, 100% {{ opacity: 1; }} }}
</style>
<text x="10" y="32">without caches: the model reads {tokens:,} tokens of documents, again</text>
<rect class="track" x="10" y="44" width="{width}" height="26" rx="4"/>
<rect class="full run" x="10" y="44" width="{width}" height="26" rx="4"/>
<text class="full word" x="10" y="92">first word after {full_s:.1f} s</text>
<text x="10" y="132">kvcag: the documents were read once, the model reads the question</text>
<rect class="track" x="10" y="144" width="{width}" height="26" rx="4"/>
<rect class="ours run" x="10" y="144" width="{ours_width:.1f}" height="26" rx="4"/>
<text class="ours word" x="10" y="192">first word after {ours_s:.2f} s: {times:.0f} × faster, the same answer</text>
</svg>
"""


def picture(row: dict[str, Any]) -> str:
    full_s, ours_s = (row["systems"][peer.name]["ttft_s"] for peer in (FullPrefill, Exact))
    seconds = full_s + PAUSE
    return PICTURE.format(
        label=f"First word after {full_s:.1f} s without caches, after {ours_s:.2f} s with kvcag",
        tokens=row["context_tokens"],
        width=WIDTH,
        ours_width=max(4.0, WIDTH * ours_s / full_s),
        round=seconds,
        full_at=100 * full_s / seconds,
        ours_at=100 * ours_s / seconds,
        full_s=full_s,
        ours_s=ours_s,
        times=full_s / ours_s,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="about so many tokens of documents")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img" / "race.svg")
    given = parser.parse_args()
    report = json.loads((ROOT / "benchmarks" / "results" / "report" / "report.json").read_text(encoding="utf-8"))
    row = min(report["rows"], key=lambda row: abs(row["context_tokens"] - given.tokens))
    given.out.write_text(picture(row), encoding="utf-8")


if __name__ == "__main__":
    main()
