"""MemoryCube: texts and the caches made from them, as one memory.

The idea is MemOS's cube: a plaintext memory and an activation memory that travel together. Here the caches follow the
texts: what was edited or deleted has no cache left, and what has no cache yet is read from its text.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

from kvcag.chat_template import Message, Prompt, as_messages
from kvcag.contexts import MAX_KL, Strategy
from kvcag.core import Chunk, TextualMemoryItem, Usage
from kvcag.cube.answer import AnswerReport, CubeAnswer
from kvcag.cube.dump import CubeSettings, read_dump, read_settings, write_dump
from kvcag.cube.lifecycle import CubeTexts
from kvcag.cube.retrieved import FoundTexts
from kvcag.cube.texts import SearchableTexts, TextSide, said
from kvcag.documents import segment
from kvcag.engines.base import Engine
from kvcag.engines.constrain import ConstraintLike
from kvcag.errors import CacheWarning, ContextLengthError, CorpusLengthError, InvalidInputError
from kvcag.memory import KVCacheMemory, insert_documents
from kvcag.stores.base import KVStore
from kvcag.stores.disk import DiskStore
from kvcag.stores.memory import MemoryStore
from kvcag.streams import in_thread, iterate


class MemoryCube(CubeTexts):
    """Texts, the caches made from them, and one life for both. Safe to use from several threads.

    ```python
    cube = MemoryCube(engine, instruction="Answer from the notes.")
    cube.add(["The tower was completed in 1889.", "The bridge was opened in 1932."])
    cube.ask("When was the tower completed?").text
    cube.dump("cube/")
    ```

    Args:
        engine: the model that encodes and answers. One that keeps no caches (any `Engine` but `HFEngine`) reads the
            texts for every question.
        texts: where texts are found: `kvcag.langchain.VectorStoreTexts`, `kvcag.llama_index.IndexTexts` and others.
            None: the cube alone holds them, and every question is answered from all.
        store: where caches are kept: a `KVStore` of this cube's own, or a folder (a `DiskStore` with the cube's
            namespace). In memory by default.
        instruction: stands before the texts, in the system turn.
        namespace: whose cube it is: a user's, a corpus's. Two share no file, no hit and no recent context.
        strategy: how caches are put together (`KVCacheMemory.merge`). `"exact"` keeps the texts that a question is
            answered from together, as one cache: the answer is that of a full prefill, and an edit encodes all of
            them again. Any other keeps each by itself.
        ratio: the recompute ratio.

    Attributes:
        memory: the activation side: a `KVCacheMemory`.
        texts: the plaintext side, if it has a place of its own.
    """

    def __init__(
        self,
        engine: Engine,
        texts: TextSide | None = None,
        store: KVStore | str | PathLike[str] | None = None,
        *,
        instruction: str | None = None,
        namespace: str = "",
        strategy: Strategy = "query",
        ratio: float = 0.2,
    ) -> None:
        if store is None:
            store = MemoryStore()
        elif not isinstance(store, KVStore):
            store = DiskStore(Path(store), namespace=namespace)
        super().__init__(KVCacheMemory(engine, store, instruction, namespace=namespace), texts)
        self.namespace = namespace
        self.strategy = strategy
        self.ratio = ratio

    @classmethod
    def from_dir(
        cls,
        dir: str | PathLike[str],
        engine: Engine,
        texts: TextSide | None = None,
        store: KVStore | str | PathLike[str] | None = None,
        **settings: Any,
    ) -> MemoryCube:
        """A cube as it was dumped, with its instruction and namespace. Arguments as for the class, errors as `load`."""
        dumped = read_settings(dir)
        cube = cls(
            engine, texts, store, **{"instruction": dumped.instruction, "namespace": dumped.namespace, **settings}
        )
        cube.load(dir)
        return cube

    # --- answers -------------------------------------------------------------------------------------------------

    def encode(self) -> int:
        """Encode what is not encoded yet, before anybody asks, and return how many caches were made.

        Questions that are asked meanwhile are answered in between. Under strategy `"exact"` all texts are one cache,
        and where `texts` are searched nobody knows yet which ones will stand together: nothing is encoded.

        Raises:
            UnsupportedModelError: the engine keeps no caches.
            ContextLengthError: a text, or under `"exact"` all together, exceed the model's context.
        """
        texts = self.get_all()
        if self.strategy == "exact":
            together = [] if isinstance(self.texts, SearchableTexts) else [texts]
        else:
            together = [[text] for text in texts]
        return sum(self._encode(each) for each in together)  # not map: a StopIteration would look like the end

    def ask(
        self,
        question: str | Sequence[Message],
        k: int | None = None,
        *,
        strategy: Strategy | None = None,
        ratio: float | None = None,
        max_kl: float = MAX_KL,
        constraint: ConstraintLike | None = None,
        **sampling: Any,
    ) -> CubeAnswer:
        """Answer a question from the cube; where nothing is found, without any text.

        Args:
            question: a str, or chat messages that end with it.
            k: the most texts to answer from, where `texts` are searched.
            strategy: see the class; None is the cube's.
            ratio: the recompute ratio; None is the cube's.
            max_kl: what strategy `"auto"` allows, nats a token.
            constraint: what the answer must be: a pydantic model, a JSON schema, `Regex`, `Choices` or `Grammar`.
            **sampling: see `Sampling`.

        Raises:
            CorpusLengthError: the texts do not fit into the model's context; it says what to do.
            InvalidInputError: see `search`; or an unknown setting.
            ConstraintError: the constraint cannot be used.
        """
        answering = {"strategy": strategy, "ratio": ratio, "max_kl": max_kl, "constraint": constraint, **sampling}
        sources, held, chunks = self._open(question, k, **answering)
        with closing(chunks):
            return self._answer(sources, held, list(chunks))

    def stream(
        self, question: str | Sequence[Message], k: int | None = None, **answering: Any
    ) -> Generator[Chunk, None, None]:
        """`ask`, piece by piece; the last chunk's usage says how its context was made. Closing it stops the model."""
        return self._open(question, k, **answering)[2]

    # --- moving --------------------------------------------------------------------------------------------------

    def dump(self, dir: str | PathLike[str]) -> None:
        """Write texts and caches into a folder, in place of the dump that is there, in one step or not at all.

        Caches that were made from other texts as well are left out: a dump holds nothing that the cube does not say.

        Raises:
            StoreUnavailableError: the disk is full, permission was denied. What was there before is as it was.
        """
        texts = self.get_all()
        instruction = self._caches.instruction()
        settings = CubeSettings(
            namespace=self.namespace,
            instruction=self.memory.instruction,
            head_id=instruction.id if instruction else None,
        )
        items = self._caches.made_of({said(text.memory) for text in texts})
        write_dump(dir, settings, texts, chain([instruction] if instruction else [], items))

    def load(self, dir: str | PathLike[str]) -> None:
        """Add what a folder holds; texts of the same id are replaced. `texts` are given what they do not have yet.

        Caches that this cube's model made are used. The others' texts are encoded again when they are asked for, or
        by `encode`, and one `CacheWarning` says so. Everything is read and checked first: when this raises, the cube
        is as it was.

        Raises:
            StoreUnavailableError: there is no dump, or it cannot be read.
            CorruptItemError: a file was cut, changed or is missing; it is named.
            FormatError: a newer release wrote it, or it is no dump of a cube.
            InvalidInputError: it is the cube of another namespace.
        """
        dumped = read_dump(dir)
        if dumped.settings.namespace != self.namespace:
            raise InvalidInputError(
                f"{dir} holds the cube of namespace {dumped.settings.namespace!r}, and this one is of "
                f"{self.namespace!r}. Load it into a MemoryCube(..., namespace={dumped.settings.namespace!r})."
            )
        with self._lock:
            if isinstance(self.texts, FoundTexts):  # a retriever finds its own: there is nothing to write to
                self._follow(dumped.texts)
            else:
                self.add(dumped.texts)
            foreign = self._caches.take(dumped.items, dumped.settings.head_id)
        reasons = list(next(iter(foreign.values()), []))
        if dumped.settings.instruction != self.memory.instruction and dumped.items:
            reasons.append(f"instruction: {dumped.settings.instruction!r:.40}, not {self.memory.instruction!r:.40}")
        if reasons:
            warnings.warn(
                f"the caches in {dir} were made otherwise ({'; '.join(reasons)}), so their texts are encoded again. "
                "The answers are right; the first ones come later. Call encode() to have it done ahead.",
                CacheWarning,
                stacklevel=2,
            )

    # --- asynchronously ------------------------------------------------------------------------------------------

    async def aask(self, question: str | Sequence[Message], k: int | None = None, **answering: Any) -> CubeAnswer:
        """`ask`, in worker threads; cancelling stops the model."""
        sources, held, chunks = await in_thread(self._open, question, k, **answering)
        async with aclosing(iterate(lambda: chunks)) as pieces:
            return self._answer(sources, held, [piece async for piece in pieces])

    async def astream(
        self, question: str | Sequence[Message], k: int | None = None, **answering: Any
    ) -> AsyncGenerator[Chunk, None]:
        """`stream`, in worker threads."""
        async with aclosing(iterate(lambda: self.stream(question, k, **answering))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def aencode(self) -> int:
        """`encode`, in a thread."""
        return await in_thread(self.encode)

    async def adump(self, dir: str | PathLike[str]) -> None:
        """`dump`, in a thread."""
        await in_thread(self.dump, dir)

    async def aload(self, dir: str | PathLike[str]) -> None:
        """`load`, in a thread."""
        await in_thread(self.load, dir)

    # --- inside --------------------------------------------------------------------------------------------------

    def _open(
        self,
        question: str | Sequence[Message],
        k: int | None,
        *,
        strategy: Strategy | None = None,
        ratio: float | None = None,
        max_kl: float = MAX_KL,
        constraint: ConstraintLike | None = None,
        **sampling: Any,
    ) -> tuple[list[TextualMemoryItem], list[bool], Generator[Chunk, None, None]]:
        """The texts, which of them have caches, and the answer."""
        messages = as_messages(question)
        settings = self.memory.engine.sampling(**sampling)
        strategy = strategy or self.strategy
        while True:
            sources = self.search(_asked(messages), k)
            with self._lock:  # nobody deletes a text while its cache is being made
                if any(text.id not in self._known or self._known[text.id].memory != text.memory for text in sources):
                    continue
                prompt = self._prompt(sources, messages, strategy)
                held = self._caches.held(prompt)
                try:
                    chunks = self.memory.stream(
                        prompt,
                        strategy="full" if strategy == "exact" else strategy,  # one document, all of it exact
                        ratio=self.ratio if ratio is None else ratio,
                        max_kl=max_kl,
                        sampling=settings,
                        constraint=constraint,
                    )
                except ContextLengthError as error:
                    if not sources:
                        raise
                    raise CorpusLengthError(len(sources), isinstance(self.texts, SearchableTexts), error) from error
                return sources, held, chunks

    def _answer(self, sources: list[TextualMemoryItem], held: list[bool], chunks: Sequence[Chunk]) -> CubeAnswer:
        usage, reason = chunks[-1].usage, chunks[-1].finish_reason
        assert usage is not None
        assert reason is not None
        plan = _plan(sources, held, usage, len(self._caches.prompt(["…"]).head_ids))
        return CubeAnswer("".join(chunk.text for chunk in chunks), sources, plan, usage, reason)

    def _prompt(self, sources: Sequence[TextualMemoryItem], messages: list[Message], strategy: Strategy) -> Prompt:
        documents = insert_documents(self.memory.instruction or "", self._segments(sources, strategy), messages)
        return self.memory.engine.template.prompt(documents)

    def _segments(self, texts: Sequence[TextualMemoryItem], strategy: Strategy) -> list[str]:
        """What is encoded by itself: each text, or all of them together."""
        segments = [segment(text.memory) for text in texts]
        return ["".join(segments)] if strategy == "exact" and segments else segments

    def _encode(self, texts: Sequence[TextualMemoryItem]) -> bool:
        with self._lock:
            if any(self._known.get(text.id) != text for text in texts):
                return False  # edited or deleted since
            [together] = self._segments(texts, "exact")
            return self._caches.encode(together, {"doc_id": texts[0].id} if len(texts) == 1 else {})


def _asked(messages: Sequence[Message]) -> str:
    """What the user said last, as text."""
    said_last = [message["content"] for message in messages if message.get("role") == "user"]
    content = said_last[-1] if said_last else ""
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


def _plan(sources: Sequence[TextualMemoryItem], held: Sequence[bool], usage: Usage, head_tokens: int) -> AnswerReport:
    """Which side answered: by what was kept when it was asked, and by the counters."""
    ids = [text.id for text in sources]
    each = held if len(held) == len(ids) else [all(held)] * len(ids)
    report = usage.context
    read = not all(each) or not each or (report is not None and report.encoded_tokens > head_tokens)
    return AnswerReport(
        side="encoded" if read else "exact" if report is None or report.mode == "prefix" else "merged",
        cached=tuple(id for id, kept in zip(ids, each, strict=True) if kept),
        encoded=tuple(id for id, kept in zip(ids, each, strict=True) if not kept),
        report=report,
    )
