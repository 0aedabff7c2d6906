"""Build a RAG app: a vector store, a retriever, and create_retrieval_chain."""

from langchain_classic.chains import create_retrieval_chain
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_text_splitters import RecursiveCharacterTextSplitter

from kvcag.langchain import create_cag_documents_chain
from kvcag.testing import whole_prompt
from tests.programs.models import echo, tiny
from tests.retrievers import HashedWords

page = Document(
    "Task decomposition breaks a task into steps.\n\nSelf-reflection lets an agent improve on past actions.\n\n"
    "Memory is short-term or long-term.",
    metadata={"source": "agents.md"},
)
splits = RecursiveCharacterTextSplitter(chunk_size=70, chunk_overlap=0).split_documents([page])
store = InMemoryVectorStore.from_documents(splits, HashedWords())
retriever = store.as_retriever(search_kwargs={"k": 2})
system = "Use the given context to answer the question. Keep the answer concise.\n\nContext:\n{context}"
prompt = ChatPromptTemplate.from_messages([("system", system), ("human", "{input}")])

rag = create_retrieval_chain(retriever, create_cag_documents_chain(echo(whole_prompt), prompt))
results = rag.invoke({"input": "What is task decomposition?"})
print(sorted(results), [document.metadata["source"] for document in results["context"]])
print(results["answer"])

llm = tiny()
llm.precompute(splits, prompt, progress=False)
rag = create_retrieval_chain(retriever, create_cag_documents_chain(llm, prompt))
keys = [sorted(piece) for piece in rag.stream({"input": "What is memory?"})]
print(keys[:3], len(llm.memory()))
