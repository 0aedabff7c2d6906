"""An agent that answers from documents in every step; its checkpoints do not contain the documents.

    python examples/agent_with_documents.py [MODEL]

The corpus is encoded once and reused by every step of every conversation. Tools work as usual, and the arguments of a
tool call follow the tool's schema. A model with 135M parameters does not know when to call a tool, so a second
middleware forces the call; a larger model does not need this. Needs `pip install "kvcag[agents,demo]"`.
"""

from __future__ import annotations

import sys
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from kvcag.demo.model import embedded_model
from kvcag.langchain import ChatKVCAG, KVCAGMiddleware

DOCUMENTS = [
    Document("The ferry to Varn leaves from pier 3. It takes bicycles, and dogs on a lead."),
    Document("Tickets are sold on board. A return ticket costs 12 euros, children travel free."),
    Document("In a storm the ferry stays in the harbour, and tickets are valid the day after."),
]


@tool
def weather(place: str) -> str:
    """The weather at a place today."""
    return f"Storm at {place}, wind from the west."


@wrap_model_call
def look_first(request: Any, handler: Any) -> Any:
    """Answer a person's question about the weather with a call, and a tool's result without one."""
    asked = request.messages[-1]
    wants_weather = isinstance(asked, HumanMessage) and "weather" in asked.text
    return handler(request.override(tool_choice="weather") if wants_weather else request.override(tools=[]))


def main(model: str) -> list[AIMessage]:
    llm = ChatKVCAG(model=model, max_tokens=40)
    middleware = [KVCAGMiddleware(corpus=DOCUMENTS), look_first]
    agent = create_agent(llm, [weather], middleware=middleware, checkpointer=InMemorySaver())
    thread: Any = {"configurable": {"thread_id": "1"}}

    for question in ("What does a return ticket cost?", "What is the weather at Varn?"):
        state = agent.invoke({"messages": [HumanMessage(question)]}, thread)
    for message in state["messages"]:
        message.pretty_print()
    print()
    answers = [message for message in state["messages"] if isinstance(message, AIMessage)]
    for step, message in enumerate(answers, start=1):
        report = message.response_metadata["kvcag"]
        print(f"step {step}: {report['reused_tokens']} of {report['context_tokens']} context tokens reused")
    held = str(agent.get_state(thread).values)
    assert not any(document.page_content in held for document in DOCUMENTS)  # nor in the checkpoint
    return answers


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(embedded_model()))
