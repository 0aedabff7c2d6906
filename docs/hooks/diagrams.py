"""Mermaid diagrams are drawn while the site is built, so that the pages need no network and no script for them.

material loads mermaid from a CDN. Here mermaid itself runs in mermaidx's embedded JavaScript engine, and what it draws
becomes part of the page; `css/pages.css` gives it the theme's own colours, so that it follows dark mode.
"""

from __future__ import annotations

import hashlib
import html
import re
from typing import Any

import mermaidx

_FENCE = re.compile(r'<pre class="mermaid"><code>(.*?)</code></pre>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Draw each diagram of a page."""
    return _FENCE.sub(_figure, content)


def _figure(fence: re.Match[str]) -> str:
    source = html.unescape(fence[1])
    name = "diagram-" + hashlib.sha256(source.encode()).hexdigest()[:8]
    drawn = mermaidx.render(source, theme="neutral").svg().replace("my-svg", name)
    if "<svg" not in drawn or "Syntax error" in drawn:
        raise ValueError(f"mermaid cannot draw this:\n{source}")
    return f'<figure class="diagram">{drawn}</figure>'
