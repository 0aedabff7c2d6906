"""The notebook of `examples/` as a page: its text, its code and what it printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "examples" / "ttft_and_fidelity.ipynb"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the notebook's cells into its page."""
    if page.file.src_uri != "notebook.md":
        return markdown
    return "\n\n".join(map(_shown, json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]))


def _shown(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    return "\n\n".join([f"```py\n{source}\n```", *map(_output, cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![plot](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f"```text\n{text}\n```" if text else ""
