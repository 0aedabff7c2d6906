"""RouterQueryEngine: an LLM chooses the query engine."""

import json

from llama_index.core import Document
from llama_index.core.query_engine import RouterQueryEngine
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import QueryEngineTool

from kvcag.llama_index import CAGQueryEngine, KVCacheLLM
from kvcag.testing import EchoEngine, last_user_message


def answer(prompt: str) -> str:
    """Stands in for a model that chooses the second tool; otherwise it says what it was asked."""
    asked = last_user_message(prompt)
    return json.dumps([{"choice": 2, "reason": "hours"}]) if "Some choices are given below" in asked else asked


llm = KVCacheLLM(engine=EchoEngine(answer))
tools = [
    QueryEngineTool.from_defaults(CAGQueryEngine.from_documents([Document(text=text)], llm), description=about)
    for text, about in [("It is in Harbour Street.", "Useful for places"), ("It opens at nine.", "Useful for hours")]
]
query_engine = RouterQueryEngine(LLMSingleSelector.from_defaults(llm), tools, llm=llm)
response = query_engine.query("When does it open?")
print(response.metadata["selector_result"].selections)
print([source.node.get_content() for source in response.source_nodes])
