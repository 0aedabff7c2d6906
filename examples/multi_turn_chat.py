"""A conversation over documents: each turn prefills what was said and nothing else.

    python examples/multi_turn_chat.py [MODEL]

The session keeps its cache between turns. A turn can be taken back, and a conversation can go on in two directions
without being read again. `kvcag chat` is this with a prompt. Needs `pip install "kvcag[demo]"`.
"""

from __future__ import annotations

import sys

from kvcag import HFEngine, KVCacheMemory
from kvcag.demo.model import embedded_model
from kvcag.engines.session import Session

DOCUMENTS = [
    "The lighthouse of Varn is painted green. It was built in 1887 by the engineer Tomas Rehn.",
    "The harbour of Varn opens at five in the morning. The ferry to the mainland leaves at 07:40.",
    "A return ticket for the ferry costs 12 euros. Children travel free.",
]
HEAD = "You are a helpful assistant. Answer the question using only the passages below."
TURNS = ["What colour is the lighthouse?", "When was it built?", "When does the ferry leave?"]


def say(session: Session, question: str) -> str:
    """One turn, streamed, with what it cost."""
    print(f"\n> {question}\n  ", end="")
    answer = ""
    for chunk in session.stream(question, max_new_tokens=32):
        print(chunk.text, end="", flush=True)
        answer += chunk.text
    turn, tokens = session.turns[-1], len(session.token_ids)
    print(f"\n  [{turn.prefilled_tokens} tokens prefilled, the conversation has {tokens}]")
    return answer.strip()


def main(model: str) -> tuple[list[str], list[int]]:
    engine = HFEngine.from_pretrained(model)
    memory = KVCacheMemory(engine, instruction=HEAD)
    items = [memory.extract(text) for text in DOCUMENTS]
    memory.add(items)
    context = memory.merge([item.id for item in items], TURNS[0], strategy="exact")
    with Session(engine, context) as session:
        answers = [say(session, question) for question in TURNS]
        prefilled = [turn.prefilled_tokens for turn in session.turns]

        print("\nThe same conversation, with another end:")
        with session.fork() as other:  # shares the cache until one of the two writes
            other.rollback(1)
            answers.append(say(other, "What does a return ticket cost?"))
        assert len(session.turns) == len(TURNS)  # the first one is as it was
    return answers, prefilled


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(embedded_model()))
