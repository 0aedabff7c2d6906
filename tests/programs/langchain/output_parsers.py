"""Output parsers: lists, JSON, pydantic, and one of our own."""

from langchain_core.messages import AIMessage
from langchain_core.output_parsers import CommaSeparatedListOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.prompts import PromptTemplate
from pydantic import BaseModel, Field

from tests.programs.models import echo, tiny


class Actor(BaseModel):
    """An actor."""

    name: str = Field(description="name of an actor")
    films: list[str] = Field(description="list of names of films they starred in")


written = '{"name": "Tom Hanks", "films": ["Big", "Splash"]}'
print((echo(lambda prompt: "vanilla, chocolate, mint") | CommaSeparatedListOutputParser()).invoke("Five flavors?"))
print((echo(lambda prompt: f"Sure:\n```json\n{written}\n```") | JsonOutputParser()).invoke("Which actor?"))
*_, before, last = (echo(lambda prompt: written) | JsonOutputParser()).stream("Which actor?")
print(before, last)

parser = PydanticOutputParser(pydantic_object=Actor)
prompt = PromptTemplate.from_template(
    "Answer.\n{format_instructions}\n{query}\n",
    partial_variables={"format_instructions": parser.get_format_instructions()},
)
print((prompt | echo(lambda prompt: written) | parser).invoke({"query": "Which actor?"}))
bound = tiny(max_tokens=100).bind(response_format={"type": "json_schema", "json_schema": {"schema": {"const": "yes"}}})
print((bound | JsonOutputParser()).invoke("Sure?"))


def shout(message: AIMessage) -> str:
    return message.text.upper()


print((echo() | shout).invoke("hello"))
