"""Each type of decoder that transformers has: what works, as the page says."""

from __future__ import annotations

import re

import pytest
import transformers

from tests.families import PAGE, Family, examine, model_types

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(
        f"transformers {transformers.__version__} " not in PAGE.read_text(encoding="utf-8"),
        reason="the page is of another transformers",
    ),
]
ROW = re.compile(r"\| `(\S+)` \| (yes|no) \| (yes|no) \| (.*) \|")
SAID = {
    name: Family(name, exact == "yes", merged == "yes", why)
    for name, exact, merged, why in ROW.findall(PAGE.read_text(encoding="utf-8"))
}


def test_the_page_has_every_family() -> None:
    assert list(SAID) == model_types()
    assert sum(family.exact for family in SAID.values()) >= 60
    assert all(family.why for family in SAID.values() if not family.merges)


@pytest.mark.parametrize("model_type", SAID)
def test_a_family_works_as_the_page_says(model_type: str) -> None:
    assert examine(model_type) == SAID[model_type]
