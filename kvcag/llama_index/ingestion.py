"""KVCacheTransform: encodes nodes while they are ingested."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from llama_index.core.llms import LLM
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index.core.storage.docstore.types import BaseDocumentStore
from pydantic import Field, PrivateAttr
from typing_extensions import Self

from kvcag.concurrency import in_thread
from kvcag.errors import InvalidInputError
from kvcag.llama_index.messages import to_messages
from kvcag.llama_index.synthesizer import CAGSynthesizer
from kvcag.sync import Context


class KVCacheTransform(TransformComponent):
    """The last step of an `IngestionPipeline`: encodes the nodes' texts, stores the caches, and returns the same nodes.

    The step is optional: a text that is not in the store is encoded when a question needs it. When an edited document
    is ingested again, the caches of its old texts are deleted. With `docstore`, the pipeline's cache does not skip this
    step, and the caches of documents that were deleted from the docstore are deleted, too. If two documents share a
    text, deleting either document deletes the cache of that text.

    Args:
        llm: the `KVCacheLLM` that will answer. The step fills its store.
        synthesizer: the `CAGSynthesizer` that will answer, if it is not the default one. A document is encoded after
            the text that the synthesizer's template has before the documents.
        docstore: the pipeline's document store.
        collection: a name for these documents. Give each pipeline its own if several fill one store.
        context: the text before each node while it is encoded, as for `KVCacheMemory.add`. `"previous"`: the previous
            node of the same document.

    Raises:
        InvalidInputError: the synthesizer is exact, and encodes all nodes of a question as one document.
    """

    fingerprint: str = Field(description="The digest of the model: its weights, dtype and chat template.")
    template: str = Field(description="The prompt that will contain the documents.")
    collection: str = Field(description="The name of these documents.")
    context: str = Field(description="The kind of text before each node; empty for the instruction alone.")

    _synthesizer: CAGSynthesizer = PrivateAttr()
    _docstore: BaseDocumentStore | None = PrivateAttr()
    _context: Context | None = PrivateAttr()

    def __init__(
        self,
        llm: LLM | None = None,
        *,
        synthesizer: CAGSynthesizer | None = None,
        docstore: BaseDocumentStore | None = None,
        collection: str = "documents",
        context: Context | None = None,
    ) -> None:
        synthesizer = synthesizer or CAGSynthesizer(llm)
        if synthesizer.exact:
            raise InvalidInputError(
                "an exact CAGSynthesizer encodes all nodes of a question as one document, so KVCacheTransform cannot "
                "encode them one by one. Pass a synthesizer with exact=False, or leave this step out."
            )
        fields = {
            "fingerprint": synthesizer.cag.engine.fingerprint.digest,
            "template": json.dumps(to_messages(synthesizer.messages("", ["…"]))),
            "collection": collection,
            "context": context if isinstance(context, str) else type(context).__name__ if context else "",
        }
        super().__init__(**fields)
        self._synthesizer = synthesizer
        self._docstore = docstore
        self._context = context

    @classmethod
    def class_name(cls) -> str:
        """The name under which this class is serialised."""
        return "KVCacheTransform"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The key of `IngestionCache`. With a docstore, the key differs in each run, so that no deletion is skipped."""
        return {**super().to_dict(**kwargs), "run": uuid.uuid4().hex if self._docstore else ""}

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Encode new texts of these nodes, and delete the caches of texts that their documents no longer contain."""
        texts = [node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]
        sources = [node.ref_doc_id or node.node_id for node in nodes]
        said = [(text, source) for text, source in zip(texts, sources, strict=True) if text.strip()]
        kept: list[str] = []
        if said:
            kept = self._synthesizer.cag.memory.keep(
                to_messages(self._synthesizer.messages("", [text for text, _ in said])),
                [{"ref_doc_id": source, "collection": self.collection} for _, source in said],
                context=self._context,
            )
        live = set(self._docstore.get_all_document_hashes().values()) if self._docstore else None
        self._forget(set(kept), set(sources), live)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """`__call__`, in a worker thread."""
        return await in_thread(self, nodes, **kwargs)

    def _forget(self, kept: set[str], seen: set[str], live: set[str] | None) -> None:
        """Delete the caches of documents that are not `live`, and those of old texts of the documents just `seen`."""
        memory = self._synthesizer.cag.memory
        made_from: dict[str, str] = {}
        gone: set[str] = set()
        for key, manifest in memory.store.manifests():
            made_from[key] = text = manifest.records.composed_text_memory
            source = manifest.metadata.get("ref_doc_id")
            if key in kept or source is None or manifest.metadata.get("collection") != self.collection:
                continue
            if source in seen or (live is not None and source not in live):
                gone.add(text)
        gone -= {made_from[key] for key in kept if key in made_from}
        stale = [key for key, text in made_from.items() if text in gone]
        if stale:
            memory.delete(stale)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Another transform with the same model, store and docstore."""
        return self._again(deepcopy(self._synthesizer, memo))()

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process loads the model itself. A loaded engine is refused: see `LazyMemory.__reduce__`."""
        return self._again(self._synthesizer), ()

    def _again(self, synthesizer: CAGSynthesizer) -> partial[Self]:
        return partial(
            type(self),
            synthesizer=synthesizer,
            docstore=self._docstore,
            collection=self.collection,
            context=self._context,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Make a transform from the dict that `to_dict` wrote.

        Args:
            data: the dict.
            **kwargs: `llm` or `synthesizer`, and `docstore` and `context`: the dict does not contain them.

        Raises:
            InvalidInputError: the model, the template or the context is not the one in `data`.
        """
        made = cls(**{"collection": data["collection"], **kwargs})
        if (made.fingerprint, made.template) != (data["fingerprint"], data["template"]):
            raise InvalidInputError("the transform was made for another model or template: pass the same llm again")
        if made.context != data["context"]:
            raise InvalidInputError(f"the transform was made with context {data['context']!r}: pass it again")
        return made
