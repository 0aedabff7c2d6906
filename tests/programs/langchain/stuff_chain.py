"""Summarize text: the stuff chain, and ours in its place."""

from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnablePassthrough

from kvcag.langchain import create_cag_documents_chain
from kvcag.testing import whole_prompt
from tests.programs.models import echo, tiny

docs = [
    Document("Apples are red", metadata={"title": "apple_book"}),
    Document("Blueberries are blue", metadata={"title": "blueberry_book"}),
    Document("Bananas are yellow", metadata={"title": "banana_book"}),
]
prompt = ChatPromptTemplate.from_messages(
    [("system", "What are everyone's favorite colors:\n\n{context}\n\nBe brief.")]
)
settings = {"document_prompt": PromptTemplate.from_template("{title}: {page_content}")}
stuff, cag = (
    make(echo(whole_prompt), prompt, **settings) for make in (create_stuff_documents_chain, create_cag_documents_chain)
)
print(cag.invoke({"context": docs}))
print(stuff.invoke({"context": docs}) == cag.invoke({"context": docs}))

llm = tiny()
chain = create_cag_documents_chain(llm, prompt, output_parser=RunnablePassthrough())
for order in (docs, docs[::-1], docs[:2]):
    report = chain.invoke({"context": order}).response_metadata["kvcag"]
    print(report["mode"], report["encoded_tokens"] > 0)
