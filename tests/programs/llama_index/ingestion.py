"""An ingestion pipeline with a document store: only what changed is encoded again."""

from llama_index.core import Document, MockEmbedding
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore

from kvcag.llama_index import KVCacheLLM, KVCacheTransform

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]

llm = KVCacheLLM("model", max_new_tokens=8)
docstore = SimpleDocumentStore()
pipeline = IngestionPipeline(
    transformations=[SentenceSplitter(), MockEmbedding(embed_dim=8), KVCacheTransform(llm, docstore=docstore)],
    docstore=docstore,
    vector_store=SimpleVectorStore(),
    docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
)
print(len(pipeline.run(documents=documents)), "nodes are new")
print(len(pipeline.run(documents=documents)), "nodes are new")
documents[0].set_content("The library moved to Mill Lane.")
print(len(pipeline.run(documents=documents)), "nodes are new")
print(sorted(item.records.composed_text_memory.strip() for item in llm.memory.get_all()))
