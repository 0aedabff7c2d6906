"""Manage a long history: trim_messages counts with the model's own tokenizer."""

from langchain_core.messages import (
    AIMessage,
    HumanMessage,
    SystemMessage,
    filter_messages,
    merge_message_runs,
    trim_messages,
)

from kvcag.testing import whole_prompt
from tests.programs.models import echo

llm = echo(whole_prompt)
messages = [
    SystemMessage("You're a good assistant."),
    HumanMessage("I wonder why it's called langchain"),
    AIMessage("Well, I guess they thought 'WordRope' just didn't have the same ring to it!"),
    HumanMessage("And who is harrison chasing anyways"),
    AIMessage("Hmm let me think. Why, he's probably chasing after the last cup of coffee in the office!"),
    HumanMessage("What do you call a speechless parrot"),
]
print(llm.get_num_tokens_from_messages(messages) == llm.invoke(messages).usage_metadata["input_tokens"])
trimmer = trim_messages(
    max_tokens=150, strategy="last", token_counter=llm, include_system=True, start_on="human", end_on=("human", "tool")
)
print((trimmer | llm).invoke(messages).text)
print((merge_message_runs() | llm).invoke([HumanMessage("One."), HumanMessage("Two.")]).text)
print([message.type for message in filter_messages(messages, include_types=("system", "ai"))])
