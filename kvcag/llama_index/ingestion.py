"""KVCacheTransform: encodes nodes as they are ingested, so that the first question finds them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.llms import LLM
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index.core.storage.docstore.types import BaseDocumentStore
from pydantic import Field, PrivateAttr

from kvcag.errors import InvalidInputError
from kvcag.llama_index.messages import to_messages
from kvcag.llama_index.synthesizer import CAGSynthesizer
from kvcag.streams import in_thread


class KVCacheTransform(TransformComponent):
    """A last step of an `IngestionPipeline`: nodes go through unchanged, and their texts are encoded and kept.

    It is a warm-up and never needed: what is missing is encoded when it is asked for, also where the pipeline's own
    cache skipped this step. What an edited document no longer says leaves the store when the document comes again; with
    `docstore` this step is never skipped, and what was deleted there leaves the store, too. A text that two documents
    share goes with either.

    Args:
        llm: the `KVCacheLLM` that will answer; its store is filled.
        synthesizer: the `CAGSynthesizer` that will ask, where it is not the default one: a document is encoded after
            what its template says before the documents.
        docstore: the pipeline's.
        collection: whose documents these are, where several pipelines fill one store.

    Raises:
        InvalidInputError: the synthesizer keeps documents together.
    """

    fingerprint: str = Field(description="Which model encodes: its weights, dtype and chat template.")
    template: str = Field(description="The prompt that documents will stand in.")
    collection: str = Field(description="Whose documents these are.")

    _synthesizer: CAGSynthesizer = PrivateAttr()
    _docstore: BaseDocumentStore | None = PrivateAttr()

    def __init__(
        self,
        llm: LLM | None = None,
        *,
        synthesizer: CAGSynthesizer | None = None,
        docstore: BaseDocumentStore | None = None,
        collection: str = "documents",
    ) -> None:
        synthesizer = synthesizer or CAGSynthesizer(llm)
        if synthesizer.exact:
            raise InvalidInputError("an exact synthesizer keeps documents together: nodes cannot be encoded one by one")
        fields = {
            "fingerprint": synthesizer.cag.engine.fingerprint.digest,
            "template": json.dumps(to_messages(synthesizer.messages("", ["…"]))),
            "collection": collection,
        }
        super().__init__(**fields)
        self._synthesizer = synthesizer
        self._docstore = docstore

    @classmethod
    def class_name(cls) -> str:
        """The name under which this class is serialised."""
        return "KVCacheTransform"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """What `IngestionCache` goes by. With a docstore no run is like another: a deletion must not be skipped."""
        return {**super().to_dict(**kwargs), "run": uuid.uuid4().hex if self._docstore else ""}

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Encode what is new in these nodes, and forget what their documents no longer say."""
        texts = [node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]
        sources = [node.ref_doc_id or node.node_id for node in nodes]
        said = [(text, source) for text, source in zip(texts, sources, strict=True) if text.strip()]
        kept: list[str] = []
        if said:
            kept = self._synthesizer.cag.memory.keep(
                to_messages(self._synthesizer.messages("", [text for text, _ in said])),
                [{"ref_doc_id": source, "collection": self.collection} for _, source in said],
            )
        live = set(self._docstore.get_all_document_hashes().values()) if self._docstore else None
        self._forget(set(kept), set(sources), live)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """`__call__`, in a worker thread."""
        return await in_thread(self, nodes, **kwargs)

    def prune(self, live: Iterable[str]) -> list[str]:
        """Forget every document whose id is not among these; returns the ids of the items that left the store."""
        return self._forget(set(), set(), set(live))

    def _forget(self, kept: set[str], seen: set[str], live: set[str] | None) -> list[str]:
        """Delete what was made from documents that are gone, or that were `seen` and say it no longer.

        The same text may have been encoded after other heads as well, by whoever asked: that goes with it.
        """
        store = self._synthesizer.cag.memory.store
        made_from: dict[str, str] = {}
        gone: set[str] = set()
        for key in list(store.keys()):
            manifest = store.manifest(key)
            if manifest is None:
                continue
            made_from[key] = text = manifest.records.composed_text_memory
            source = manifest.metadata.get("ref_doc_id")
            if key in kept or source is None or manifest.metadata.get("collection") != self.collection:
                continue
            if source in seen or (live is not None and source not in live):
                gone.add(text)
        gone -= {made_from[key] for key in kept if key in made_from}
        stale = [key for key, text in made_from.items() if text in gone]
        store.delete(stale)
        return stale

    def __getstate__(self) -> dict[str, Any]:
        raise InvalidInputError(
            "a KVCacheTransform encodes with the one model of this process: run the pipeline without num_workers"
        )
