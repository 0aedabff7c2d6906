"""How to return structured data from a model."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from tests.programs.models import tiny


class Joke(BaseModel):
    """Joke to tell user."""

    setup: str = Field(description="The setup of the joke", max_length=10)
    punchline: str = Field(description="The punchline to the joke", max_length=10)
    rating: Literal["good", "bad"]


class JokeDict(TypedDict):
    """Joke to tell user."""

    setup: Annotated[Literal["why?", "who?"], ..., "The setup of the joke"]
    rating: Annotated[Literal[1, 2, 3], ..., "How funny the joke is"]


llm = tiny(max_tokens=150, temperature=1.0, seed=1)
joke = llm.with_structured_output(Joke).invoke("Tell me a joke about cats")
print(type(joke).__name__, sorted(joke.model_dump()), joke.rating in ("good", "bad"))

for method in ("json_schema", "function_calling", "json_mode"):
    said = llm.with_structured_output(JokeDict, method=method).invoke("Tell me a joke about cats")
    print(method, sorted(said), said["setup"] in ("why?", "who?"), said["rating"] in (1, 2, 3))

raw = llm.with_structured_output(JokeDict, include_raw=True).invoke("Tell me a joke about cats")
print(sorted(raw), raw["parsing_error"], raw["raw"].response_metadata["finish_reason"])

*_, last = llm.with_structured_output(JokeDict).stream("Tell me a joke about cats")
print(sorted(last))
