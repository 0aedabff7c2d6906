"""Settings: one LLM, one tokenizer and one embedding model for everything."""

from llama_index.core import Document, MockEmbedding, Settings, SummaryIndex, VectorStoreIndex

from kvcag.llama_index import CAGSynthesizer, KVCacheLLM

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]

Settings.llm = KVCacheLLM("model", max_new_tokens=8)
Settings.tokenizer = Settings.llm.engine.template.encode
Settings.embed_model = MockEmbedding(embed_dim=8)
Settings.chunk_size = 512

answers = [
    index.from_documents(documents).as_query_engine(response_synthesizer=CAGSynthesizer()).query("Where is it?")
    for index in (VectorStoreIndex, SummaryIndex)
]
print([len(response.source_nodes) for response in answers])
print(len(Settings.tokenizer("as many tokens as bytes")))
print(len(Settings.llm.memory), "documents are kept")
