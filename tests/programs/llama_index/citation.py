"""CitationQueryEngine: numbered sources in the prompt."""

from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.query_engine.citation_query_engine import CITATION_QA_TEMPLATE

from kvcag.llama_index import CAGSynthesizer, KVCacheLLM

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]

llm = KVCacheLLM("model", max_new_tokens=8)
index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=8))
query_engine = CitationQueryEngine.from_args(
    index,
    llm=llm,
    response_synthesizer=CAGSynthesizer(llm, text_qa_template=CITATION_QA_TEMPLATE),
    similarity_top_k=2,
    citation_chunk_size=512,
)
response = query_engine.query("When does it open?")
print([source.node.get_content().split("\n")[0] for source in response.source_nodes])
print(len(llm.memory), "documents are kept")
