"""SubQuestionQueryEngine: a question is divided among tools, each a query engine."""

import json

from llama_index.core import Document
from llama_index.core.query_engine import SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.tools import QueryEngineTool

from kvcag.llama_index import CAGQueryEngine, CAGSynthesizer, KVCacheLLM
from kvcag.testing import EchoEngine, last_user_message

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]


def answer(prompt: str) -> str:
    """Stands in for a model that divides questions; otherwise it says what it was asked."""
    asked = last_user_message(prompt)
    if "sub_question" in asked and "<Tools>" in asked:
        items = [{"sub_question": "When does it open?", "tool_name": "library"}]
        return f"```json\n{json.dumps({'items': items})}\n```"
    return asked[-60:]


llm = KVCacheLLM(engine=EchoEngine(answer))
tool = QueryEngineTool.from_defaults(
    CAGQueryEngine.from_documents(documents, llm), name="library", description="Knows the library."
)
query_engine = SubQuestionQueryEngine.from_defaults(
    [tool],
    llm=llm,
    question_gen=LLMQuestionGenerator.from_defaults(llm),
    response_synthesizer=CAGSynthesizer(llm),
    use_async=False,
    verbose=False,
)
response = query_engine.query("When can I read there?")
print([source.node.get_content().split("\n")[0] for source in response.source_nodes])
print("asked:", "When can I read there?" in str(response))
