"""The templates of LlamaIndex's documentation on prompts: the model reads the same prompt as with LlamaIndex."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate, RichPromptTemplate
from llama_index.core.prompts.chat_prompts import CHAT_TEXT_QA_PROMPT
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.response_synthesizers import CompactAndRefine
from llama_index.core.schema import NodeWithScore, TextNode

from kvcag.chat_template import ChatTemplate, Document
from kvcag.errors import CacheWarning
from kvcag.llama_index import CAGSynthesizer, KVCacheLLM
from kvcag.llama_index.messages import to_messages
from tests.vocabularies import FAMILIES, tokenizer_of

TEXTS = ["The tower is 330 metres tall.", "It was built in 1889 {by} Eiffel.", "It stands in Paris."]

QA = """Context information is below.
---------------------
{{ context_str }}
---------------------
Given the context information and not prior knowledge, answer the query.
Query: {{ query_str }}
Answer:"""
FORMATTED = QA.replace("{{ ", "{").replace(" }}", "}")
CHAT = """{% chat role="system" %}
You always answer from the context.
{% endchat %}
{% chat role="user" %}
Context: {{ context_str }}
Answer the question: {{ query_str }}
{% endchat %}"""


def bullets(**variables: Any) -> str:
    """The function of the documentation's example."""
    return "\n\n".join(f"- {text}" for text in variables["context_str"].split("\n\n"))


def examples(**variables: Any) -> str:
    return f"Example of a question like {variables['query_str']!r}: none."


AS_DOCUMENTS: dict[str, BasePromptTemplate] = {
    "core's default": DEFAULT_TEXT_QA_PROMPT_SEL,
    "core's chat prompt": CHAT_TEXT_QA_PROMPT,
    "rich": RichPromptTemplate(QA),
    "rich chat": RichPromptTemplate(CHAT),
    "format string": PromptTemplate(FORMATTED),
    "on one line": PromptTemplate("{context_str} {query_str}"),
    "context last": PromptTemplate("{query_str}\n\n{context_str}"),
    "chat messages": ChatPromptTemplate(
        [
            ChatMessage(content="Always answer from the context.", role=MessageRole.SYSTEM),
            ChatMessage(content=FORMATTED, role=MessageRole.USER),
        ]
    ),
    "tuples": ChatPromptTemplate.from_messages([("system", "From {context_str}"), ("user", "{query_str}")]),
    "variables under other names": RichPromptTemplate(
        "{{ my_context }}\n---\n{{ my_query }}",
        template_var_mappings={"context_str": "my_context", "query_str": "my_query"},
    ),
    "partially formatted": PromptTemplate(FORMATTED + " In the style of {tone_name}.").partial_format(tone_name="Poe"),
    "a function of the question": RichPromptTemplate(
        "{{ few_shot_examples }}\n" + QA, function_mappings={"few_shot_examples": examples}
    ),
    "a function that keeps the context": RichPromptTemplate(
        QA, function_mappings={"context_str": lambda **variables: f"[{variables['context_str']}]"}
    ),
}
NOT_ON_LINES = {"on one line", "rich chat", "tuples", "a function that keeps the context"}
AS_TEXT: dict[str, BasePromptTemplate] = {
    "a function of the context": RichPromptTemplate(QA, function_mappings={"context_str": bullets}),
    "a function, format string": PromptTemplate(FORMATTED, function_mappings={"context_str": bullets}),
    "a filter": RichPromptTemplate(QA.replace("context_str", "context_str | upper")),
    "a loop": RichPromptTemplate(
        "{% for text in context_str.split('\n\n') %}{{ loop.index }}. {{ text }}\n{% endfor %}{{ query_str }}"
    ),
    "a condition": RichPromptTemplate("{% if 'tall' in context_str %}{{ context_str }}{% endif %}\n{{ query_str }}"),
}


def found() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text), score=1.0) for text in TEXTS]


def of_core(llm: KVCacheLLM, template: BasePromptTemplate) -> str:
    return str(CompactAndRefine(llm, text_qa_template=template).synthesize("How tall?", found()))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", AS_DOCUMENTS)
def test_documents_keep_their_caches_in_templates_that_show_them_as_they_are(
    llm: KVCacheLLM, name: str, exact: bool
) -> None:
    synthesizer = CAGSynthesizer(llm, text_qa_template=AS_DOCUMENTS[name], exact=exact)
    messages = to_messages(synthesizer.messages("How tall?", TEXTS))
    documents = [part for message in messages for part in message["content"] if isinstance(part, Document)]
    assert len(documents) == (1 if exact else len(TEXTS))
    assert str(synthesizer.synthesize("How tall?", found())) == of_core(llm, AS_DOCUMENTS[name])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", AS_DOCUMENTS)
def test_the_model_reads_cores_own_tokens(llm: KVCacheLLM, name: str, family: str) -> None:
    """Regression: 18 of 18 prompts differed by a blank line after the documents."""
    template, tokens = AS_DOCUMENTS[name], ChatTemplate(tokenizer_of(family))
    cores = llm._get_messages(template, query_str="How tall?", context_str="\n\n".join(TEXTS))
    expected = tokens.prompt(to_messages(cores)).token_ids
    exact, merged = (
        to_messages(CAGSynthesizer(llm, text_qa_template=template, exact=exact).messages("How tall?", TEXTS))
        for exact in (True, False)
    )
    assert tokens.prompt(exact, seams="none").token_ids == expected  # merge_strategy="exact"
    for messages in (exact, merged):
        prompt = tokens.prompt(messages, seams="documents")
        assert (prompt.token_ids == expected) == (prompt.seams == 0)
        assert prompt.seams == 0 or name in NOT_ON_LINES
    assert prompt.kept_ids == tuple(tokens.encode_text(f"{text}\n\n") for text in TEXTS)


@pytest.mark.parametrize("name", AS_TEXT)
def test_documents_that_the_template_changes_are_read_as_core_reads_them_and_it_is_said(
    llm: KVCacheLLM, name: str
) -> None:
    synthesizer = CAGSynthesizer(llm, text_qa_template=AS_TEXT[name])
    with pytest.warns(CacheWarning, match=r"the template changes \{context_str\}"):
        answer = str(synthesizer.synthesize("How tall?", found()))
    assert answer == of_core(llm, AS_TEXT[name])


def test_a_template_without_documents_is_asked_as_it_is(llm: KVCacheLLM) -> None:
    template = PromptTemplate("Just {query_str}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = str(CAGSynthesizer(llm, text_qa_template=template).synthesize("How tall?", found()))
    assert answer == of_core(llm, template) == "user: Just How tall?"
