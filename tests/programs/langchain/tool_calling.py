"""How to use chat models to call tools: bind, call, and pass the results back."""

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool

from tests.programs.models import tiny


@tool
def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


@tool
def get_weather(location: str, unit: str = "celsius") -> str:
    """Get the weather at a location."""
    return f"It is sunny in {location}."


llm = tiny(max_tokens=120, temperature=1.0, seed=7)
messages = [HumanMessage("What is 3 + 12?")]
ai_message = llm.bind_tools([add, get_weather], tool_choice="add").invoke(messages)
messages.append(ai_message)
for call in ai_message.tool_calls:
    print(call["name"], sorted(call["args"]), [type(value).__name__ for value in call["args"].values()])
    result = add.invoke(call)
    print(result.type, result.name, int(result.content) == call["args"]["a"] + call["args"]["b"])
    messages.append(result)
print(ai_message.response_metadata["finish_reason"])

answer = llm.bind_tools([add, get_weather], tool_choice="none").invoke(messages)
print(answer.tool_calls, answer.usage_metadata["input_token_details"]["cache_read"] > 0)

gathered = None
for chunk in llm.bind_tools([get_weather], tool_choice="any").stream("And in Paris?"):
    gathered = chunk if gathered is None else gathered + chunk
print([piece["name"] for piece in gathered.tool_call_chunks], "location" in gathered.tool_calls[0]["args"])
