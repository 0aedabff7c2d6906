"""Few-shot prompts: examples in the conversation, encoded once."""

from langchain_core.prompts import ChatPromptTemplate, FewShotChatMessagePromptTemplate

from kvcag.testing import whole_prompt
from tests.programs.models import echo, tiny

examples = [{"input": "2 🦜 2", "output": "4"}, {"input": "2 🦜 3", "output": "5"}]
example_prompt = ChatPromptTemplate.from_messages([("human", "{input}"), ("ai", "{output}")])
few_shot = FewShotChatMessagePromptTemplate(example_prompt=example_prompt, examples=examples)
prompt = ChatPromptTemplate.from_messages(
    [("system", "You are a wondrous wizard of math."), few_shot, ("human", "{input}")]
)
print((prompt | echo(whole_prompt)).invoke({"input": "What is 2 🦜 9?"}).text)

chain = prompt | tiny()
first, second = chain.invoke({"input": "What is 2 🦜 9?"}), chain.invoke({"input": "What is 3 🦜 3?"})
shared = len(prompt.invoke({"input": ""}).to_string().encode())
print(first.usage_metadata["input_tokens"] == second.usage_metadata["input_tokens"])
print(second.usage_metadata["input_token_details"]["cache_read"] > shared // 2)
