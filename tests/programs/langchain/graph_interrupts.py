"""LangGraph: a graph whose answer a human approves before it is sent."""

from typing import Any

from langchain_core.messages import AIMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

from tests.programs.models import echo

llm = echo()


def draft(state: MessagesState) -> dict[str, Any]:
    return {"messages": [llm.invoke(state["messages"])]}


def approve(state: MessagesState) -> Command[Any]:
    said = interrupt({"draft": state["messages"][-1].text})
    if said == "yes":
        return Command(goto=END)
    last = state["messages"][-1]
    return Command(goto=END, update={"messages": [AIMessage(said, id=last.id)]})


builder = StateGraph(MessagesState)
builder.add_node(draft)
builder.add_node(approve)
builder.add_edge(START, "draft")
builder.add_edge("draft", "approve")
graph = builder.compile(checkpointer=InMemorySaver())

for number, decision in enumerate(("yes", "Not now.")):
    thread = {"configurable": {"thread_id": str(number)}}
    state = graph.invoke({"messages": [("user", "Ship it?")]}, thread)
    print(state["__interrupt__"][0].value)
    state = graph.invoke(Command(resume=decision), thread)
    print([message.text for message in state["messages"]])
    print([snapshot.next for snapshot in graph.get_state_history(thread)][::-1])
