"""Caching of model responses: set_llm_cache, beside the caches of keys and values."""

from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache

from tests.programs.models import tiny

cache = InMemoryCache()
set_llm_cache(cache)
try:
    llm = tiny()
    first, again = llm.invoke("Tell me a joke"), llm.invoke("Tell me a joke")
    print(first.text == again.text, len(cache._cache))
    llm.invoke("Tell me a joke", temperature=0.5, seed=1)
    print(len(cache._cache))
    contexts = [llm.create_context([text]) for text in ("corpus one", "corpus two")]
    for context in contexts:
        llm.bind(cached_content=context).invoke("Tell me a joke")
    print(len(cache._cache))
    print(sum(len(list(llm.stream("Tell me a joke"))) > 1 for _ in range(2)), "of two were streamed")
finally:
    set_llm_cache(None)
print(llm.invoke("Tell me a joke").text == first.text)
