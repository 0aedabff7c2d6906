"""An FAQ bot: every entry is encoded once, and each question is answered from the two entries that fit it.

    python examples/faq_bot.py [MODEL]

The cache of each entry is stored in a folder, so only new entries are encoded. If you run this twice, the second run
encodes nothing. Needs `pip install "kvcag[demo]"`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from kvcag import HFEngine, KVCacheMemory
from kvcag.demo.model import embedded_model
from kvcag.stores import DiskStore

FAQ = [
    "Opening hours: the shop opens at nine on weekdays, and at ten on Saturdays.",
    "Returns: you can return a parcel to any counter within 30 days, with the receipt.",
    "Delivery: a parcel takes two days on the mainland, and five days to the islands.",
    "Payment: you can pay by card or by bank transfer, at the counter or online.",
    "Complaints: Mrs Ode answers complaints within one day.",
]
QUESTIONS = [
    "Within how many days can I return a parcel?",
    "How many days does a parcel take on the mainland?",
    "How quickly are complaints answered?",
]
HEAD = "You are a helpful assistant. Answer the question using only the passages below."


def closest(question: str, entries: dict[str, str], k: int = 2) -> list[str]:
    """The ids of the entries that share the most words with a question. Any retriever will do."""
    asked = set(question.lower().strip("?").split())
    return sorted(entries, key=lambda id: -len(asked & set(entries[id].lower().strip(".").split())))[:k]


def main(model: str, folder: str | Path) -> list[tuple[str, int]]:
    engine = HFEngine.from_pretrained(model)
    memory = KVCacheMemory(engine, DiskStore(folder), instruction=HEAD)
    kept = memory.sync(FAQ, corpus="faq")
    print(f"{kept.encoded} entries encoded, {kept.kept} kept already")
    entries = dict(zip(kept.ids, FAQ, strict=True))

    answers = []
    for question in QUESTIONS:
        context = memory.merge(closest(question, entries), question, strategy="query", ratio=0.2)
        answer = engine.generate(past_key_values=context, max_new_tokens=32).strip()
        report = context.report
        reused = f"{report.reused_tokens} of {report.context_tokens} tokens reused"
        print(f"\n{question}\n  {answer}\n  [{reused}, {report.recomputed_tokens} recomputed]")
        answers.append((answer, report.encoded_tokens))
    return answers


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(embedded_model()), Path(tempfile.gettempdir()) / "kvcag-faq")
