"""Tests several processes with one store for stale, torn and lost items, and measures what local tiers save.

    python benchmarks/several_readers.py DIRECTORY [--minutes 15 | --answers 80] [--store directory]
    python benchmarks/several_readers.py DIRECTORY [--minutes 15 | --answers 80] --store bucket

Four processes answer, each with a local tier in front of the shared store (two in memory, two on disk), one encodes new
versions of documents, and one deletes. One of the four is killed every 20 seconds and started again with its local
tier; with --answers, one is killed halfway. The store is a directory, or an S3 server on 127.0.0.1. Each process logs
its operations, with their begin and end. Afterwards every look-up is compared with the puts and deletions at that time:

- stale: an answer, a look-up or a listing found an item that was deleted or replaced before it began;
- lost: it did not find an item that was put before it began and not deleted;
- torn: keys and values are not those of the text.

Exits with 1 if there is any, and with --results writes the figures to benchmarks/results/several_readers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvcag import HFEngine, KVCacheMemory
from kvcag.cache.layers import layers_of
from kvcag.chat_template import Document
from kvcag.errors import InvalidInputError, UnknownItemError
from kvcag.stores import DiskStore, FsspecStore, KVStore, MemoryStore, TieredStore
from kvcag.testing import byte_tokenizer, tiny_model
from tests.s3_server import s3_server

RESULTS = Path(__file__).parent / "results" / "several_readers.json"
SLOTS, READERS, KILLED_EVERY = 24, 4, 20.0
LOCAL_BYTES = 3 << 20
"""Of a local tier: about as many bytes as half of the documents take, so that it evicts."""
NOT_DELETED = [f"Page {number} of the handbook. " + f"It is about {number}. " * 6 for number in range(6)]
"""Texts that readers are given with a question. Whoever needs one first encodes it, and it stays."""

STARTED_BY = os.getpid()

torch.set_num_threads(1)  # before any fork


def text_of(slot: int, version: int) -> str:
    return f"Document {slot}, version {version}. " + f"Its number is {slot * 7919 + version}. " * (4 + slot % 5)


# --- what each process does ---------------------------------------------------------------------------------------


@dataclass
class Journal:
    """A process's log: a line of JSON for each thing that it did. Other processes read it while it grows."""

    path: Path
    seen: int = 0

    def write(self, what: str, began: float, **about: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "from": began, "to": time.monotonic(), **about}) + "\n")

    def new(self) -> Iterator[dict[str, Any]]:
        """The lines that were written since this was called before. A line that is being written comes next time."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.seen)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.seen += len(line)
                yield json.loads(line)


@dataclass
class Documents:
    """What the encoder has published, newest version last, as another process knows it."""

    journal: Journal
    texts: dict[str, str] = field(default_factory=dict)
    versions: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    handles: set[str] = field(default_factory=set)

    def read(self) -> Documents:
        for event in self.journal.new():
            if event["what"] == "put" and event["key"] not in self.texts:
                self.texts[event["key"]] = event["text"]
                self.versions[event["slot"]].append(event["key"])
                if event["is_handle"]:
                    self.handles.add(event["key"])
        return self

    def current(self) -> list[str]:
        return [keys[-1] for keys in self.versions.values()]

    def superseded(self) -> list[str]:
        return [key for keys in self.versions.values() for key in keys[:-1]]


def is_over(folder: Path) -> bool:
    """Whether the run has ended, or who started it is gone."""
    return (folder / "over").exists() or os.getppid() != STARTED_BY


def memory_over(store: KVStore) -> KVCacheMemory:
    return KVCacheMemory(HFEngine(tiny_model(), byte_tokenizer()), store, "Use the documents.")


def encode(store: KVStore, folder: Path, dice: random.Random) -> None:
    """Publish a document, a new version of one, or other metadata for the current one."""
    memory, journal = memory_over(store), Journal(folder / "encoder.log")
    known, count, revision = Documents(Journal(journal.path)), Counter[int](), 0
    while not is_over(folder):
        known.read()
        slot, revision = dice.randrange(SLOTS), revision + 1
        began, metadata = time.monotonic(), {"source": f"slot {slot}", "revision": revision}
        if known.versions[slot] and dice.random() < 0.25:
            key = known.versions[slot][-1]
            memory.documents.update(key, {"revision": revision})
            journal.write("update", began, key=key, revision=revision)
        else:
            count[slot] += 1
            text = text_of(slot, count[slot])
            is_handle = slot % 6 == 0
            if is_handle:
                key, revision_of = memory.create_context([text], "Read.", [f"slot {slot}"]), None
            else:
                [key], revision_of = memory.add(_Text(text, metadata)), revision
            journal.write("put", began, key=key, slot=slot, text=text, revision=revision_of, is_handle=is_handle)
        time.sleep(dice.uniform(0.3, 0.9))


@dataclass
class _Text:
    memory: str
    metadata: dict[str, Any]


def delete(store: KVStore, folder: Path, dice: random.Random) -> None:
    """Delete versions that were replaced, and sometimes all of a document by its source."""
    memory, journal = memory_over(store), Journal(folder / "deleter.log")
    known, deleted = Documents(Journal(folder / "encoder.log")), set[str]()
    while not is_over(folder):
        time.sleep(dice.uniform(0.3, 1.2))
        known.read()
        began = time.monotonic()
        if dice.random() < 0.05 and known.versions:
            slot = dice.choice(list(known.versions))
            keys = list(known.versions[slot])
            memory.purge(f"slot {slot}")
            journal.write("purge", began, keys=keys)
            deleted.update(keys)
        elif old := [key for key in known.superseded() if key not in deleted]:
            chosen = dice.sample(old, min(len(old), 2))
            memory.delete(chosen)
            journal.write("delete", began, keys=chosen)
            deleted.update(chosen)


def answer(store: KVStore, folder: Path, name: str, dice: random.Random) -> None:
    """Ask by ids, by handles and with texts, look items up, and list the store. Log what was found."""
    reader = Reader(
        memory_over(store), Journal(folder / f"{name}.log"), Documents(Journal(folder / "encoder.log")), dice
    )
    acts: dict[Callable[[], None], int] = {
        reader.ask: 5,
        reader.look_up: 4,
        reader.ask_by_handle: 1,
        reader.ask_with_texts: 2,
        reader.list_all: 1,
    }
    while not is_over(folder):
        time.sleep(dice.uniform(0.05, 0.35))
        if not reader.known.read().texts:
            continue
        [act] = dice.choices(list(acts), list(acts.values()))
        began = time.monotonic()
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                act()
        except Exception as error:  # reported as a failure of the run
            reader.journal.write("failed", began, error=repr(error))
        for warning in said:
            reader.journal.write("warned", began, about=str(warning.message))
    assert isinstance(store, TieredStore)
    reader.journal.write("tiers", 0, hits=[[tier.stats().hits, tier.stats().misses] for tier in store.tiers])


@dataclass
class Reader:
    memory: KVCacheMemory
    journal: Journal
    known: Documents
    dice: random.Random
    right: dict[str, Any] = field(default_factory=dict)

    def some(self, count: int) -> list[str]:
        """Ids of current documents, and sometimes of one that was replaced and may be deleted."""
        items = [key for key in self.known.current() if key not in self.known.handles]
        old = [key for key in self.known.superseded() if key not in self.known.handles]
        chosen = self.dice.sample(items, min(len(items), count))
        if old and self.dice.random() < 0.25:
            chosen[-1:] = [self.dice.choice(old[-12:])]
        return chosen

    def ask(self) -> None:
        ids = self.some(self.dice.randint(1, 3))
        strategy = self.dice.choice(["auto", "rotate", "query", "exact"])
        began, missing = time.monotonic(), list[str]()
        try:
            if ids:
                self.answered(began, self.memory.ask("What?", ids, strategy=strategy, max_new_tokens=2))
        except UnknownItemError as error:
            missing = error.ids
        for id in missing or ids:
            self.journal.write("read", began, key=id, by="ask", is_found=not missing)

    def ask_by_handle(self) -> None:
        handles = [key for key in self.known.texts if key in self.known.handles]
        if not handles:
            return
        id = self.dice.choice(handles[-6:])
        began, is_found = time.monotonic(), True
        try:
            messages = self.memory.with_context(id, [{"role": "user", "content": "What?"}])
        except InvalidInputError:
            is_found = False
        self.journal.write("read", began, key=id, by="handle", is_found=is_found)
        if is_found:
            self.answered(began, self.memory.ask(messages, max_new_tokens=2))

    def ask_with_texts(self) -> None:
        chosen = self.dice.sample(NOT_DELETED, 2)
        messages = [
            {"role": "system", "content": ["Use the documents.\n\n", *(Document(f"{text}\n\n") for text in chosen)]},
            {"role": "user", "content": "What?"},
        ]
        began = time.monotonic()
        self.answered(began, self.memory.ask(messages, strategy="rotate", max_new_tokens=2))  # type: ignore[arg-type]

    def answered(self, began: float, given: Any) -> None:
        report, usage = given.report, given.usage
        tokens = (report.reused_tokens, report.recomputed_tokens, report.encoded_tokens) if report else (0, 0, 0)
        self.journal.write("answer", began, tokens=tokens, prompt=usage.prompt_tokens, cached=usage.cached_tokens)

    def look_up(self) -> None:
        for id in self.some(1):
            began = time.monotonic()
            item = self.memory.get(id)
            revision = None if item is None else item.metadata.get("revision")
            self.journal.write("read", began, key=id, by="get", is_found=item is not None, revision=revision)
            if item is not None and not self.is_whole(id, item):
                self.journal.write("torn", began, key=id)

    def is_whole(self, id: str, item: Any) -> bool:
        """Whether an item has its text's tokens, keys and values: those that this process computes itself."""
        if id not in self.right:
            alone = memory_over(MemoryStore())
            self.right[id] = alone.extract(self.known.texts[id])
        right = self.right[id]
        pairs = zip(layers_of(item.memory), layers_of(right.memory), strict=True)
        close = all(
            torch.allclose(ours, theirs, atol=1e-5) for a, b in pairs for ours, theirs in zip(a, b, strict=True)
        )
        return close and torch.equal(item.token_ids, right.token_ids) and item.id == right.id == id

    def list_all(self) -> None:
        began = time.monotonic()
        listed = set(self.memory.store.keys())
        for id in self.known.texts:
            self.journal.write("read", began, key=id, by="list", is_found=id in listed)


# --- processes ----------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


@contextmanager
def bucket() -> Iterator[dict[str, str]]:
    """A server in a process of its own. Yields its environment."""
    reading, writing = os.pipe()

    def serve() -> None:
        with s3_server() as server:
            os.write(writing, json.dumps(server.environment).encode() + b"\n")
            signal.pause()

    child = in_child(serve)
    try:
        with open(reading, encoding="utf-8") as lines:
            yield json.loads(lines.readline())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(writing)


@dataclass
class Run:
    """How far a run is. It takes `minutes` or, unless `answers` is 0, so many answers and a tenth as many deletions."""

    folder: Path
    minutes: float
    answers: int
    began: float = field(default_factory=time.monotonic)
    made: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        names = ["deleter", *(f"reader-{number}" for number in range(READERS))]
        self.journals = [Journal(self.folder / f"{name}.log") for name in names]
        self.kills = 1 if self.answers else max(round(60 * self.minutes / KILLED_EVERY), 1)

    def done(self) -> float:
        """The share of it that is over."""
        if not self.answers:
            return (time.monotonic() - self.began) / (60 * self.minutes)
        self.made.update(event["what"] for journal in self.journals for event in journal.new())
        return min(self.made["answer"], 10 * self.made["delete"]) / self.answers


def run(folder: Path, minutes: float, answers: int, place: str) -> dict[str, Any]:
    """Traffic over a store, and what it shows."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def shared() -> KVStore:
        return FsspecStore("s3://bucket/kv") if place == "bucket" else DiskStore(folder / "shared")

    def start_reader(number: int, seed: int) -> int:
        def work() -> None:
            disk = DiskStore(folder / f"local-{number}", LOCAL_BYTES) if number >= READERS // 2 else None
            store = TieredStore([disk or MemoryStore(LOCAL_BYTES), shared()])
            answer(store, folder, f"reader-{number}", random.Random(seed))

        return in_child(work)

    progress = Run(folder, minutes, answers)
    processes = [
        in_child(lambda: encode(shared(), folder, random.Random(1))),
        in_child(lambda: delete(shared(), folder, random.Random(2))),
        *(start_reader(number, 100 + number) for number in range(READERS)),
    ]
    killed, dice = 0, random.Random(3)
    while (done := progress.done()) < 1:
        if done >= (killed + 0.5) / progress.kills:
            number = dice.randrange(READERS)
            os.kill(processes[2 + number], signal.SIGKILL)
            os.waitpid(processes[2 + number], 0)
            killed += 1
            processes[2 + number] = start_reader(number, 1000 + killed)
        time.sleep(0.1)
    (folder / "over").touch()
    failed = sum(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0 for process in processes)
    took = round((time.monotonic() - progress.began) / 60, 2)
    return {"store": place, "minutes": took, "killed": killed, "failed processes": failed, **judge(folder)}


# --- what the logs show -------------------------------------------------------------------------------------------


def judge(folder: Path) -> dict[str, Any]:
    """Counts of what was done, of what nothing explains, and of where items and tokens came from."""
    written = [event for name in ("encoder", "deleter") for event in Journal(folder / f"{name}.log").new()]
    readers = [event for path in sorted(folder.glob("reader-*.log")) for event in Journal(path).new()]
    writes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    purges = [event for event in written if event["what"] == "purge"]
    for event in written:
        for key in event.get("keys") or [event["key"]]:
            writes[key].append(event)
    counts = Counter(event["what"] for event in (*written, *readers))
    wrong: dict[str, list[Any]] = {"stale": [], "lost": [], "torn": [], "errors": []}
    for event in readers:
        if event["what"] == "read":
            verdict = unexplained(event, writes[event["key"]], purges)
            if verdict:
                wrong[verdict].append({**event, "writes": writes[event["key"]]})
        elif event["what"] in ("torn", "failed"):
            wrong["torn" if event["what"] == "torn" else "errors"].append(event)
    (folder / "wrong.json").write_text(json.dumps(wrong, indent=1))
    tiers = [event["hits"] for event in readers if event["what"] == "tiers"]
    local, remote = (tuple(map(sum, zip(*(each[tier] for each in tiers), strict=True))) for tier in (0, 1))
    tokens = [
        sum(each) for each in zip(*(event["tokens"] for event in readers if event["what"] == "answer"), strict=True)
    ]
    answers = [event for event in readers if event["what"] == "answer"]
    return {
        **{f"{what}s": counts[what] for what in ("answer", "read", "put", "update", "delete", "purge")},
        "reads of what was deleted or not there": sum(not e["is_found"] for e in readers if e["what"] == "read"),
        **{what: len(events) for what, events in wrong.items()},
        "local tier": {"hits": local[0], "misses": local[1], "rate": local[0] / max(sum(local), 1)},
        "shared store": {"hits": remote[0], "misses": remote[1]},
        "context tokens": dict(zip(("reused", "recomputed", "encoded"), tokens, strict=True)),
        "prompt tokens from caches": sum(e["cached"] for e in answers) / max(sum(e["prompt"] for e in answers), 1),
        "warnings": Counter(event["about"][:80] for event in readers if event["what"] == "warned").most_common(5),
    }


def unexplained(read: dict[str, Any], writes: list[dict[str, Any]], purges: Iterable[dict[str, Any]]) -> str:
    """`stale` or `lost`, for a look-up that no order of what was under way explains; empty otherwise."""
    puts = [each for each in writes if each["what"] in ("put", "update")]
    deletes = [each for each in writes if each["what"] in ("delete", "purge")]
    if read["is_found"]:
        revision = read.get("revision")
        shown = [put for put in puts if revision is None or put["revision"] == revision]
        gone = (
            any(
                later["from"] > put["to"] and later["to"] < read["from"]
                for later in (puts if revision else []) + deletes
            )
            or put["from"] > read["to"]
            for put in shown
        )
        return "stale" if all(gone) else ""
    for put in puts:
        if put["what"] == "update" or put["to"] > read["from"]:
            continue  # an update of what is gone does nothing
        if any(each["to"] > put["from"] and each["from"] < put["to"] for each in purges):
            continue  # a purge by text drops whatever another process is encoding
        if not any(each["to"] > put["from"] and each["from"] < read["to"] for each in deletes):
            return "lost"
    return ""


def is_sound(found: dict[str, Any]) -> bool:
    return not any(found[what] for what in ("stale", "lost", "torn", "errors", "failed processes"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="is emptied first")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=15)
    length.add_argument("--answers", type=int, default=0, help="end after so many, however long they take")
    parser.add_argument("--store", choices=["directory", "bucket"], default="directory")
    parser.add_argument(
        "--results", action="store_true", help=f"write {RESULTS.name}, beside the other store's figures"
    )
    arguments = parser.parse_args()
    if arguments.store == "bucket":
        with bucket() as environment:
            os.environ.update(environment)
            found = run(arguments.directory, arguments.minutes, arguments.answers, "bucket")
    else:
        found = run(arguments.directory, arguments.minutes, arguments.answers, "directory")
    print(json.dumps(found, indent=2))
    if arguments.results:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**kept, arguments.store: found}, indent=2) + "\n")
    sys.exit(0 if is_sound(found) else 1)


if __name__ == "__main__":
    main()
