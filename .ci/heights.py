"""The height of each page of the built site in a window of 1,280 pixels, in a real browser.

    make docs && python .ci/heights.py [SITE]

Needs chromium. Ends with 1 if a page that people wrote is higher than 12,000 pixels; those of `api/` are generated.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MOST = 12_000
SCRIPT = """<script>
addEventListener("load", () => document.title = `H=${document.documentElement.scrollHeight}`)
</script>"""
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900")
PATIENCE = ("--virtual-time-budget=2000", "--dump-dom")


def height(page: Path, browser: str) -> int:
    """Pixels, asked of the browser by a copy of the page that puts them into its title."""
    with tempfile.NamedTemporaryFile("w", suffix=".html", dir=page.parent, encoding="utf-8") as copy:
        copy.write(page.read_text(encoding="utf-8").replace("</body>", f"{SCRIPT}</body>"))
        copy.flush()
        done = subprocess.run(
            [browser, *OPTIONS, *PATIENCE, f"file://{copy.name}"], capture_output=True, text=True, check=True
        )
    found = re.search(r"<title>H=(\d+)", done.stdout)
    return int(found[1]) if found else 0


def main() -> None:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "site").resolve()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("chromium is not installed")
    found = {str(page.parent.relative_to(site)): height(page, browser) for page in sorted(site.rglob("index.html"))}
    for name, pixels in sorted(found.items(), key=lambda each: each[1]):
        print(f"{pixels:6,}  {name}")
    sys.exit(any(pixels > MOST and not name.startswith("api") for name, pixels in found.items()))


if __name__ == "__main__":
    main()
