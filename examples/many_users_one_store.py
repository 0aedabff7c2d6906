"""Many users with one store and one model: each user finds only their own items, and can have them deleted.

    python examples/many_users_one_store.py [MODEL]

A namespace separates a user's files and recent contexts. With a salt, the folder does not reveal which texts it
holds, or for whom. Needs `pip install "kvcag[demo]"`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from kvcag import Document, HFEngine, KVCacheMemory, Sampling
from kvcag.demo.model import embedded_model
from kvcag.stores import DiskStore

HEAD = "Answer in one short sentence, from these notes."
SHARED = "The office is in Harbour Street 7. It opens at nine."
NOTES = {
    "ann": [SHARED, "Ann's appointment is on Tuesday at ten, with Dr Lind."],
    "bob": [SHARED, "Bob's appointment is on Friday at two, with Dr Sand."],
}
SALT = b"a secret of this server"


def memory_of(user: str, engine: HFEngine, folder: str | Path) -> KVCacheMemory:
    """A user's view of the store. The engine, and with it the weights, are everybody's."""
    store = DiskStore(folder, namespace=user, salt=SALT)
    return KVCacheMemory(engine, store, instruction=HEAD, namespace=user)


def ask(memory: KVCacheMemory, notes: list[str], question: str) -> tuple[str, int]:
    """The answer, and how many tokens had to be encoded for it."""
    system = {"role": "system", "content": [f"{HEAD}\n\n", *(Document(f"{note}\n\n") for note in notes)]}
    messages = [system, {"role": "user", "content": question}]
    chunks = list(memory.stream(messages, sampling=Sampling(max_new_tokens=24)))
    report = chunks[-1].usage.context
    answer = "".join(chunk.text for chunk in chunks).strip()
    print(f"  {memory.namespace}: {answer} [{report.encoded_tokens} tokens encoded]")
    return answer, report.encoded_tokens


def main(model: str, folder: str | Path) -> dict[str, list[int]]:
    engine = HFEngine.from_pretrained(model)
    memories = {user: memory_of(user, engine, folder) for user in NOTES}
    encoded: dict[str, list[int]] = {}
    for round_ in ("first", "second"):
        print(f"{round_} time:")
        for user, memory in memories.items():
            tokens = ask(memory, NOTES[user], "When is the appointment?")[1]
            encoded.setdefault(user, []).append(tokens)

    # The shared note was encoded for each user, so the time of an answer does not reveal another user's notes.
    print(f"Ann's items: {len(list(memories['ann'].store.keys()))}, Bob's: {len(list(memories['bob'].store.keys()))}")
    deleted = memories["ann"].purge(NOTES["ann"][1] + "\n\n")
    print(f"Ann asks to be forgotten: {len(deleted.ids)} item deleted, Bob's notes are as they were")
    assert len(list(memories["bob"].store.keys())) == 2
    return encoded


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if len(sys.argv) > 1 else str(embedded_model()), folder)
