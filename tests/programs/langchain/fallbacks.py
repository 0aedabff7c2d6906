"""Fallbacks: another model answers where ours refuses."""

from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from kvcag import KVCAGError
from tests.programs.models import echo, tiny

prompt = ChatPromptTemplate.from_messages([("system", "Be nice."), ("human", "{text}")])
other = FakeListChatModel(responses=["from the other model"])
chain = prompt | tiny().with_fallbacks([other], exceptions_to_handle=(KVCAGError,)) | StrOutputParser()
print(chain.invoke({"text": "far too long " * 300}))

longer = prompt | tiny().with_fallbacks([echo()]) | StrOutputParser()
print(len(longer.invoke({"text": "far too long " * 300}, config={"tags": ["x"]})) > 100)

bad = ChatPromptTemplate.from_messages([("human", "{text}")]) | tiny(max_tokens=5000) | StrOutputParser()
good = prompt | echo() | StrOutputParser()
print(bad.with_fallbacks([good]).invoke({"text": "Hello."}))
