"""Streaming: tokens of a query engine, and of the LLM itself."""

from llama_index.core import Document, MockEmbedding, VectorStoreIndex

from kvcag.llama_index import CAGSynthesizer, KVCacheLLM

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]

llm = KVCacheLLM("model", max_new_tokens=8)
index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=8))
whole = index.as_query_engine(llm=llm, response_synthesizer=CAGSynthesizer(llm)).query("Where is it?")
streaming = index.as_query_engine(llm=llm, response_synthesizer=CAGSynthesizer(llm, streaming=True))
pieces = list(streaming.query("Where is it?").response_gen)
print("no empty piece:", all(pieces))
print("the same answer:", "".join(pieces) == str(whole))
*_, last = llm.stream_complete("Where is it?")
print("the same completion:", last.text == llm.complete("Where is it?").text)
