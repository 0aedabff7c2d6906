"""Structured output: an LLM that answers with objects, as a whole and as they are written."""

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from pydantic import BaseModel, Field

from kvcag.llama_index import KVCacheLLM


class Song(BaseModel):
    """A song."""

    title: str = Field(max_length=8)
    seconds: int = Field(ge=0, le=999)


llm = KVCacheLLM("model", max_new_tokens=120)
song = llm.structured_predict(Song, PromptTemplate("Name a song about {topic}."), topic="rain")
print(type(song).__name__, 0 <= song.seconds <= 999)
structured = llm.as_structured_llm(Song)
response = structured.chat([ChatMessage(content="Name a song about rain.")])
print("as JSON:", Song.model_validate_json(response.message.content) == response.raw == song)
partial = [each.raw for each in structured.stream_chat([ChatMessage(content="Name a song about rain.")])]
print("partial objects:", len(partial) > 2, "the last is whole:", partial[-1] == song)
