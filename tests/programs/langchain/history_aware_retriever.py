"""Add chat history: a history-aware retriever rephrases the question, and the chain answers."""

from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.vectorstores import InMemoryVectorStore

from kvcag.langchain import create_cag_documents_chain
from kvcag.testing import whole_prompt
from tests.programs.models import echo
from tests.retrievers import HashedWords

store = InMemoryVectorStore(HashedWords())
store.add_documents([Document("The tower is 330 metres tall."), Document("The bridge is red.")])
rephrase = ChatPromptTemplate.from_messages(
    [
        ("system", "Formulate a standalone question."),
        MessagesPlaceholder("chat_history"),
        ("human", "{input}"),
    ]
)
answer = ChatPromptTemplate.from_messages(
    [("system", "Answer from:\n\n{context}"), MessagesPlaceholder("chat_history"), ("human", "{input}")]
)
standalone = echo(lambda prompt: "How tall is the tower?")
retriever = create_history_aware_retriever(standalone, store.as_retriever(search_kwargs={"k": 1}), rephrase)
chain = create_retrieval_chain(retriever, create_cag_documents_chain(echo(whole_prompt), answer))

chat_history: list[HumanMessage | AIMessage] = []
for question in ("How tall is the tower?", "Is it taller than the bridge?"):
    state = chain.invoke({"input": question, "chat_history": chat_history})
    print([document.page_content for document in state["context"]])
    print(state["answer"])
    chat_history += [HumanMessage(question), AIMessage("330 metres.")]
