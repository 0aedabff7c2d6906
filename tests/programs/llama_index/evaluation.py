"""Evaluation: is an answer faithful to its sources, and do these and the answer fit the question?"""

from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.evaluation import FaithfulnessEvaluator, RelevancyEvaluator

from kvcag.llama_index import CAGSynthesizer, KVCacheLLM
from kvcag.testing import EchoEngine, last_user_message

documents = [
    Document(text="The library is in Harbour Street, next to the post office.", doc_id="place"),
    Document(text="The library opens at nine on weekdays and at ten on Saturdays.", doc_id="hours"),
]


def answer(prompt: str) -> str:
    """Stands in for a judge: yes where the text in question is in the context."""
    asked = last_user_message(prompt)
    return "YES" if "YES" in asked and "at nine" in asked else "It opens at nine."


llm = KVCacheLLM(engine=EchoEngine(answer))
index = VectorStoreIndex.from_documents(documents, embed_model=MockEmbedding(embed_dim=8))
query_engine = index.as_query_engine(llm=llm, response_synthesizer=CAGSynthesizer(llm))
question = "When does the library open?"
response = query_engine.query(question)
print(response, FaithfulnessEvaluator(llm=llm).evaluate_response(response=response).passing)
print(RelevancyEvaluator(llm=llm).evaluate_response(query=question, response=response).passing)
