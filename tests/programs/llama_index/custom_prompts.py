"""Prompts: another template for a query engine, variables under other names, functions of variables."""

from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.prompts import RichPromptTemplate

from kvcag.llama_index import CAGSynthesizer, KVCacheLLM
from kvcag.testing import EchoEngine

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]

llm = KVCacheLLM(engine=EchoEngine(), max_new_tokens=500)
index = VectorStoreIndex.from_documents(documents[1:], embed_model=MockEmbedding(embed_dim=8))
query_engine = index.as_query_engine(llm=llm, response_synthesizer=CAGSynthesizer(llm))
print(sorted(query_engine.get_prompts()))

shakespeare = RichPromptTemplate(
    "Context information is below.\n---\n{{ my_context }}\n---\nIn the style of {{ tone_name }}: {{ my_query }}",
    template_var_mappings={"context_str": "my_context", "query_str": "my_query"},
).partial_format(tone_name="a Shakespeare play")
query_engine.update_prompts({"response_synthesizer:text_qa_template": shakespeare})
print(query_engine.query("When does it open?"))
