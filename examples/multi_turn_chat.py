"""A conversation over documents: each turn prefills only its own tokens.

    python examples/multi_turn_chat.py [MODEL]

A conversation is a list of messages. The engine holds recent contexts, so you can take back a turn, or continue a
conversation in two ways, and the model does not read the earlier messages again. `kvcag chat` does the same in the
terminal. Needs `pip install "kvcag[demo]"`.
"""

from __future__ import annotations

import sys

from kvcag import KVCacheMemory
from kvcag.chat_template import Message
from kvcag.demo.model import embedded_model

DOCUMENTS = [
    "The lighthouse of Varn is painted green. It was built in 1887 by the engineer Tomas Rehn.",
    "The harbour of Varn opens at five in the morning. The ferry to the mainland leaves at 07:40.",
    "A return ticket for the ferry costs 12 euros. Children travel free.",
]
HEAD = "You are a helpful assistant. Answer the question using only the passages below."
TURNS = ["What colour is the lighthouse?", "When was it built?", "When does the ferry leave?"]


def say(memory: KVCacheMemory, id: str, messages: list[Message], question: str) -> tuple[list[Message], int]:
    """One turn, streamed, with what it cost: the conversation with its answer, and the tokens that were prefilled."""
    print(f"\n> {question}\n  ", end="")
    asked: list[Message] = [*messages, {"role": "user", "content": question}]
    answer = ""
    for chunk in memory.stream(memory.with_context(id, asked), max_new_tokens=32):
        print(chunk.text, end="", flush=True)
        answer += chunk.text
        usage = chunk.usage
    prefilled = usage.prompt_tokens - usage.cached_tokens
    print(f"\n  [{prefilled} tokens prefilled, the conversation has {usage.total_tokens}]")
    return [*asked, {"role": "assistant", "content": answer}], prefilled


def main(model: str) -> tuple[list[str], list[int]]:
    memory = KVCacheMemory(model)
    id = memory.create_context(DOCUMENTS, HEAD)
    messages: list[Message] = []
    prefilled = []
    for question in TURNS:
        messages, tokens = say(memory, id, messages, question)
        prefilled.append(tokens)

    print("\nThe same conversation, with another end:")
    other, tokens = say(memory, id, messages[:-2], "What does a return ticket cost?")
    prefilled.append(tokens)
    return [message["content"] for message in [*messages, other[-1]] if message["role"] == "assistant"], prefilled


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(embedded_model()))
