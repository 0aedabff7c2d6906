"""Extract many facts from one document: the model reads it once, and fills each schema from its cache.

    python examples/structured_extraction.py [MODEL]

A grammar allows only valid JSON of the schema and ends within the token budget, so even a small model's answer can
be parsed. kvcag does not check whether the facts are right. Needs `pip install "kvcag[demo,structured]"`.
"""

from __future__ import annotations

import sys
import time
from typing import Literal

from pydantic import BaseModel, Field

from kvcag import Choices, HFEngine, KVCacheMemory, Regex
from kvcag.demo.model import embedded_model

DOCUMENT = """The ferry to Varn leaves from pier 3 at 07:40. It runs on weekdays only. The captain is Mira Sand.
A return ticket costs 12 euros. Dogs must be on a lead."""


class Ferry(BaseModel):
    captain: str = Field(max_length=20)
    leaves_at: str = Field(pattern=r"^\d\d:\d\d$")


class Ticket(BaseModel):
    price: int
    kind: Literal["single", "return"]


QUESTIONS = {
    "Who is the captain, and when does the ferry leave?": Ferry,
    "What does a return ticket cost?": Ticket,
    "Who is the captain?": Choices(["Ode Lind", "Tomas Rehn", "Mira Sand"]),
    "From which pier does the ferry leave?": Regex(r"pier \d"),
}


def main(model: str) -> list[str]:
    engine = HFEngine.from_pretrained(model)
    memory = KVCacheMemory(engine, instruction="You are a helpful assistant. Answer from this document.")
    item = memory.extract(DOCUMENT)
    memory.add(item)
    print(f"{len(item.token_ids)} tokens read once\n")

    answers = []
    for question, constraint in QUESTIONS.items():
        started = time.perf_counter()
        context = memory.merge(item.id, question)  # one document after its head: exact, nothing is recomputed
        answer = engine.generate(past_key_values=context, constraint=constraint, max_new_tokens=40)
        print(f"{question}\n  {answer}  ({time.perf_counter() - started:.2f} s)")
        if isinstance(constraint, type):
            print(f"  {constraint.model_validate_json(answer)!r}")
        assert context.report.encoded_tokens == context.report.recomputed_tokens == 0
        answers.append(answer)
    return answers


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(embedded_model()))
