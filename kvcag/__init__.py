"""kvcag: documents encoded once into KV caches, merged per question, answered from in LangChain and LlamaIndex."""

__version__ = "0.1.0"
