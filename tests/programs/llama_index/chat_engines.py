"""Chat engines: the modes that answer from retrieved nodes, and their memory."""

from llama_index.core import Document, MockEmbedding, VectorStoreIndex

from kvcag.llama_index import CAGCondensePlusContextChatEngine, CAGContextChatEngine, KVCacheLLM

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]

llm = KVCacheLLM("model", max_new_tokens=8)
index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=8))
for engine in (CAGContextChatEngine, CAGCondensePlusContextChatEngine):
    chat_engine = engine.from_defaults(index.as_retriever(), llm=llm, system_prompt="You know the library.")
    chat_engine.chat("When does it open?")
    response = chat_engine.chat("And on Saturdays?")
    print(engine.__name__, len(response.source_nodes), [message.role.value for message in chat_engine.chat_history])
    chat_engine.reset()
    print(len(chat_engine.chat_history), "messages after reset")
print(len(llm.memory), "documents are kept")
