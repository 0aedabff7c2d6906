"""QueryFusionRetriever: an LLM writes more questions, and the ranks of two retrievers are joined."""

from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.retrievers.bm25 import BM25Retriever

from kvcag.llama_index import CAGSynthesizer, KVCacheLLM
from kvcag.testing import EchoEngine

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]

llm = KVCacheLLM("model", max_new_tokens=8)
writer = KVCacheLLM(engine=EchoEngine(lambda prompt: "When does the library open?\nIs it open at ten?"))
index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=8))
bm25 = BM25Retriever.from_defaults(docstore=index.docstore, similarity_top_k=2)
retriever = QueryFusionRetriever(
    [index.as_retriever(similarity_top_k=2), bm25],
    llm=writer,
    num_queries=3,
    mode="reciprocal_rerank",
    similarity_top_k=2,
    use_async=False,
    verbose=True,
)
query_engine = RetrieverQueryEngine(retriever, CAGSynthesizer(llm))
response = query_engine.query("When does the library open on Saturdays?")
print(sorted(source.node.ref_doc_id for source in response.source_nodes))
print(len(llm.memory), "documents are kept")
