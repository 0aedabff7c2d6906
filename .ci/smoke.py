"""Is what was built what a user gets?

    cd EMPTY && CLEAN/bin/python smoke.py CHECKOUT

Run by the Python of a clean environment, in an empty folder, on the installed package alone (extra `cli`). CHECKOUT is
where the version and the changelog stand, and where the package must not come from.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvcag
from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import cache_argument
from kvcag.stores.disk import DiskStore
from kvcag.testing import EchoEngine

LATE = "The library opens at nine."
PLACE = "The library is in Harbour Street."


def installed(checkout: Path) -> None:
    """The package's own files, its version, its licence and its command."""
    home = Path(kvcag.__file__).resolve().parent
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"imported from {home}"
    version = re.search(r'__version__ = "(.+)"', (checkout / "kvcag" / "__init__.py").read_text(encoding="utf-8"))[1]
    assert (home / "py.typed").is_file(), "type hints do not ship"
    about = distribution("kvcag")
    assert version == kvcag.__version__ == about.version, (version, kvcag.__version__, about.version)
    assert any(file.name == "LICENSE" for file in about.files or []), "the licence does not ship"
    said = subprocess.run([Path(sys.executable).with_name("kvcag"), "--version"], capture_output=True, text=True)
    assert said.stdout.strip() == f"kvcag {version}", said


def echoes() -> None:
    """An engine without weights answers."""
    answer = "".join(chunk.text for chunk in KVCacheMemory(EchoEngine()).stream("Are you there?"))
    assert answer == "Are you there?", answer


def model() -> HFEngine:
    """A tiny Llama with random weights, the same each time."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=272,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return HFEngine(AutoModelForCausalLM.from_config(config).eval(), EchoEngine().tokenizer)


def keeps_and_merges() -> None:
    """Encoded by one memory, kept on disk, merged by another; with everything recomputed it is a full prefill."""
    first = KVCacheMemory(model(), store=DiskStore("kv"), instruction="Answer from the documents.")
    items = [first.extract(text) for text in (LATE, PLACE)]
    first.add(items)
    second = KVCacheMemory(model(), store=DiskStore("kv"), instruction="Answer from the documents.")
    ids = [item.id for item in items]
    for strategy in ("rotate", "query", "full"):
        context = second.merge(ids, "Where is the library?", strategy=strategy)
        answer = second.engine.generate(past_key_values=context, max_new_tokens=8)
        assert context.report.encoded_tokens + context.report.reused_tokens > 0, context.report
    with torch.no_grad():
        expected = second.engine.model(torch.cat([context.token_ids, context.tail_ids])[None]).logits[0, -1]
        given = cache_argument(second.engine.model, context.cache)
        found = second.engine.model(context.tail_ids[None], **given).logits[0, -1]
    assert torch.allclose(expected, found, atol=1e-4), (expected - found).abs().max()
    assert isinstance(answer, str)


if __name__ == "__main__":
    installed(Path(sys.argv[1]).resolve())
    echoes()
    keeps_and_merges()
    print(f"kvcag {kvcag.__version__} is installed and answers: {Path(kvcag.__file__).parent}")
