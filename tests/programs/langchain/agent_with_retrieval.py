"""Build a RAG agent: a retriever as a tool beside another, and documents in the system message, not in checkpoints."""

from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.tools import create_retriever_tool, tool
from langchain_core.vectorstores import InMemoryVectorStore
from langgraph.checkpoint.memory import InMemorySaver

from kvcag.langchain import KVCAGMiddleware
from tests.programs.models import echo, tiny
from tests.retrievers import HashedWords

DOCUMENTS = [
    Document("The tower was completed in 1889.", id="tower"),
    Document("The bridge was opened in 1932.", id="bridge"),
]
store = InMemoryVectorStore(HashedWords())
store.add_documents(DOCUMENTS)
retrieve = create_retriever_tool(store.as_retriever(search_kwargs={"k": 1}), "retrieve", "Search for information.")


@tool
def age(year: int) -> str:
    """How old something of a year is."""
    return f"{2025 - year} years"


def answer(prompt: str) -> str:
    """Calls one tool, then the other, and then says what they found."""
    if "136 years" in prompt:
        return "It is 136 years old."
    if "completed in 1889" in prompt:
        return '{"name": "age", "arguments": {"year":1889}}'
    return '{"name": "retrieve", "arguments": {"query":"When was the tower completed?"}}'


agent = create_agent(echo(answer), [retrieve, age], system_prompt="Use the tools.")
for event in agent.stream({"messages": [("user", "How old is the tower?")]}, stream_mode="values"):
    message = event["messages"][-1]
    print(message.type, message.text or [call["name"] for call in message.tool_calls])

agent = create_agent(tiny(), [age], middleware=[KVCAGMiddleware(corpus=DOCUMENTS)], checkpointer=InMemorySaver())
thread = {"configurable": {"thread_id": "1"}}
for question in ("When was the tower completed?", "And the bridge?"):
    state = agent.invoke({"messages": [("user", question)]}, thread)
    report = state["messages"][-1].response_metadata["kvcag"]
    print(report["mode"], report["encoded_tokens"] == 0, report["is_exact"])
print(len(state["messages"]), any("1889" in str(message.content) for message in state["messages"]))
