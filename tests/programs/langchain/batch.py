"""Batch: many requests, in order, as they complete, and with a limit of concurrency."""

import asyncio

from langchain_core.messages import HumanMessage, SystemMessage

from tests.programs.models import echo, tiny

questions = ["Why do parrots talk?", "How do airplanes fly?", "What is quantum computing?"]
llm = echo()
print([answer.text for answer in llm.batch(questions)])
print(sorted((number, answer.text) for number, answer in llm.batch_as_completed(questions)))
print([answer.text for answer in llm.batch(questions, config={"max_concurrency": 2})])
print([answer.text for answer in asyncio.run(llm.abatch(questions))])
failed = llm.batch(["fine", ""], return_exceptions=True)
print(failed[0].text, type(failed[1]).__name__)

tiny_llm = tiny()
shared = SystemMessage("Answer like a pirate. " * 10)
answers = tiny_llm.batch([[shared, HumanMessage(question)] for question in questions])
created = [answer.usage_metadata["input_token_details"]["cache_creation"] for answer in answers]
print(sum(count > len(shared.text) for count in created), "of them read the instruction")
alone = [tiny_llm.invoke([shared, HumanMessage(question)]).text for question in questions]
print([answer.text for answer in answers] == alone)
