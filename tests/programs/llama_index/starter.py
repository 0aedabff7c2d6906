"""The starter tutorial: an index, a query engine, a question asked twice."""

from llama_index.core import Document, MockEmbedding, VectorStoreIndex

from kvcag.llama_index import CAGSynthesizer, KVCacheLLM

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]

llm = KVCacheLLM("model", max_new_tokens=8)
index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=8))
query_engine = index.as_query_engine(llm=llm, response_synthesizer=CAGSynthesizer(llm))

response = query_engine.query("When does the library open?")
print(sorted(source.node.ref_doc_id for source in response.source_nodes))
print(len(llm.memory), "documents are kept")
print("the same answer again:", str(query_engine.query("When does the library open?")) == str(response))
