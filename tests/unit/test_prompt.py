from __future__ import annotations

import pytest

from kvcag import ChatTemplate, Document, chat_template
from kvcag.chat_template import as_messages
from kvcag.errors import ChatTemplateError, EmptyPromptError, InvalidInputError, UnsupportedContentError
from kvcag.testing import CHATML, byte_tokenizer

GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SILENT = (  # drops what the system says
    "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a default.<|im_end|>\n{% endif %}" + CHATML
)
DATED = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}" + (
    "Today: {{ date_string }}\n" + CHATML
)
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")


def template(text: str | None = CHATML, **variables: object) -> ChatTemplate:
    return ChatTemplate(byte_tokenizer(text), variables)


def text_of(template: ChatTemplate, ids: tuple[int, ...]) -> str:
    return str(template.tokenizer.decode(ids))


def chat(*documents: str, system: str = "Read.") -> list[dict[str, object]]:
    return [
        {"role": "system", "content": [f"{system}\n\n", *map(Document, documents)]},
        {"role": "user", "content": "What?"},
    ]


def test_documents_are_segments_of_their_own() -> None:
    prompt = template().prompt(chat("one\n", "two\n"))
    head, tail = text_of(template(), prompt.head_ids), text_of(template(), prompt.tail_ids)
    assert head == "<|im_start|>system\nRead.\n\n"
    assert [text_of(template(), ids) for ids in prompt.document_ids] == ["one\n", "two\n"]
    assert tail == "<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.documents == ("one\n", "two\n")
    assert prompt.token_ids == prompt.context_ids + prompt.tail_ids


def test_documents_of_several_messages_are_segments_each() -> None:
    messages = [
        {"role": "system", "content": "Read."},
        {"role": "user", "content": ["What?\n", Document("one\n"), "and\n", Document("two\n")]},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [Document("three\n"), Document("", "\n"), Document("four\n"), "And now?"]},
    ]
    prompt = template().prompt(messages)
    assert prompt.documents == ("one\n", "two\n", "three\n", "four\n")
    between = [text_of(template(), ids) for ids in prompt.between_ids]
    turns = "<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\n"
    assert between == ["and\n", turns, ""]
    assert text_of(template(), prompt.tail_ids).startswith("And now?<|im_end|>")
    ids = prompt.token_ids
    shown = [text_of(template(), ids[place.start : place.stop]) for place in prompt.document_places]
    assert tuple(shown) == prompt.documents
    plain = [{**message, "content": "".join(message["content"])} for message in messages]
    assert ids == template().prompt(plain).token_ids


def test_no_text_can_be_our_sentinel(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [*chat("one\n"), {"role": "user", "content": chat_template._sentinel(0)}]
    monkeypatch.setattr(chat_template, "_SECRET", "another process's")
    assert "kvcag-documents-0" in text_of(template(), template().prompt(said).tail_ids)


@pytest.mark.parametrize("chat_template", [CHATML, GEMMA, SILENT, DEFAULT_SYSTEM, None])
def test_split_and_whole_render_the_same_text(chat_template: str | None) -> None:
    made = template(chat_template)
    plain = [{**m, "content": "".join(m["content"])} for m in chat("one\n", "two\n")]
    assert text_of(made, made.prompt(chat("one\n", "two\n")).token_ids) == text_of(made, made.prompt(plain).token_ids)


def test_a_template_without_a_system_role_opens_the_users_turn() -> None:
    prompt = template(GEMMA).prompt(chat("one\n"))
    assert text_of(template(), prompt.token_ids).endswith(
        "<start_of_turn>user\nRead.\n\none\n\n\nWhat?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_template_that_drops_the_system_role_does_not_drop_documents() -> None:
    prompt = template(SILENT).prompt(chat("one\n"))
    assert "one" in text_of(template(), prompt.token_ids)


def test_a_default_system_prompt_does_not_join_ours() -> None:
    assert "default" not in text_of(template(), template(DEFAULT_SYSTEM).prompt(chat("one")).token_ids)


def test_a_date_can_be_pinned() -> None:
    pinned = template(DATED, date_string="1 Jan 2020").prompt(chat("one"))
    assert text_of(template(), pinned.head_ids).startswith("Today: 1 Jan 2020")


def test_two_system_messages_become_one() -> None:
    messages = [{"role": "system", "content": "A."}, {"role": "system", "content": "B."}, *as_messages("What?")]
    assert template().render(messages).startswith("<|im_start|>system\nA.\n\nB.<|im_end|>")


def test_roles_are_joined_where_the_template_wants_them_to_alternate() -> None:
    messages = [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}]
    assert "<start_of_turn>user\nOne.\n\nTwo.<end_of_turn>" in template(GEMMA).render(messages)


def test_a_completion_has_no_markup_and_one_bos() -> None:
    tokenizer = byte_tokenizer(None)
    made = ChatTemplate(tokenizer)
    assert text_of(made, made.prompt(as_messages("The capital of")).token_ids) == "The capital of"
    tokenizer._tokenizer.post_processor = _bos_processor(tokenizer.bos_token, tokenizer.bos_token_id)
    ids = ChatTemplate(tokenizer).prompt(chat("one")).token_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_chat_has_the_templates_bos_alone() -> None:
    tokenizer = byte_tokenizer(GEMMA)
    tokenizer._tokenizer.post_processor = _bos_processor(tokenizer.bos_token, tokenizer.bos_token_id)
    assert ChatTemplate(tokenizer).prompt(chat("one")).token_ids.count(tokenizer.bos_token_id) == 1


def test_a_prompt_that_opens_thinking_says_so() -> None:
    assert template(THINKING).prompt(chat("one")).thinking
    assert not template().prompt(chat("one")).thinking


def test_around_leaves_the_documents_out() -> None:
    framed = template().split_system("Read.", as_messages("What?"))
    whole = template().prompt(chat("one"))
    assert (framed.head_ids, framed.tail_ids) == (whole.head_ids, whole.tail_ids)


def test_a_system_message_in_the_question_stands_after_the_documents() -> None:
    framed = template().split_system(None, [{"role": "system", "content": "Be brief."}, *as_messages("What?")])
    assert text_of(template(), framed.tail_ids).startswith("\n\nBe brief.<|im_end|>")


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, "b"]
    assert "user\nab<|im_end|>" in template().render([{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    ("messages", "error", "says"),
    [
        ([], EmptyPromptError, "no messages"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], UnsupportedContentError, "image_url"),
        (["hello"], InvalidInputError, "'role' and 'content'"),
    ],
)
def test_what_cannot_be_rendered_is_refused(messages: list[object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        template().prompt(messages)  # type: ignore[arg-type]


def test_a_template_that_refuses_is_quoted() -> None:
    refusing = template("{{ raise_exception('only on Mondays') }}")
    with pytest.raises(ChatTemplateError, match="only on Mondays"):
        refusing.prompt(as_messages("Hello"))


def test_an_empty_question_is_refused() -> None:
    with pytest.raises(EmptyPromptError):
        as_messages("  ")


def _bos_processor(token: str, token_id: int) -> object:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=f"{token} $A", special_tokens=[(token, token_id)])


@pytest.mark.parametrize("chat_template", [CHATML, GEMMA, SILENT, THINKING, None])
@pytest.mark.parametrize("documents", [(), ("one\n", "two\n")])
def test_an_answer_that_was_begun_stays_open(chat_template: str | None, documents: tuple[str, ...]) -> None:
    begun = {"role": "assistant", "content": "It is ", "prefix": True}
    asked = [*(chat(*documents) if documents else as_messages("What?")), begun]
    for seams in ("endings", "documents", "none"):
        prompt = template(chat_template).prompt(asked, seams=seams)
        assert text_of(template(), prompt.token_ids).endswith("It is ")
        assert not prompt.thinking
    assert not text_of(template(), template(chat_template).prompt(asked[:-1]).token_ids).endswith("It is ")


def test_thinking_that_was_begun_goes_on() -> None:
    begun = {"role": "assistant", "content": "<think>\nIt is ", "prefix": True}
    assert template().prompt([*as_messages("What?"), begun]).thinking


def test_an_answer_that_the_template_drops_cannot_be_continued() -> None:
    forgetful = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    begun = {"role": "assistant", "content": "It is ", "prefix": True}
    with pytest.raises(ChatTemplateError, match="does not show the last message, which has prefix=True"):
        template(forgetful).prompt([*as_messages("What?"), begun])
