"""`kvcag ask` and `kvcag chat`: answers, reuse and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from kvcag import HFEngine
from kvcag.cli.common import INSTRUCTION, Strategy
from kvcag.core import STRATEGIES
from kvcag.engines.decode import Sampler
from kvcag.stores.disk import DiskStore
from kvcag.testing import byte_tokenizer
from tests.commands import Kvcag, saved_model, write

NOTES = "The lighthouse of Varn is painted green.\n\nIts keeper is called Ode.\n\nShe has a dog.\n\n"


@pytest.fixture
def notes(kvcag: Kvcag) -> list[str]:
    """The ids of the stored items."""
    return list(kvcag("encode", "notes", "--json").json["ids"])


@torch.no_grad()
def uncached(folder: str, question: str, tokens: int) -> str:
    """The greedy answer of the bare model to the prompt with the whole store."""
    engine = HFEngine.from_pretrained(folder)
    text = f"<|im_start|>system\n{INSTRUCTION}\n\n{NOTES}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    ids = torch.tensor([engine.template.encode(f"{text}<|im_start|>assistant\n")])
    out = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=258
    )
    return str(engine.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def test_by_default_the_items_are_merged_and_nothing_is_kept(kvcag: Kvcag, notes: list[str]) -> None:
    done = kvcag("ask", "Who?", "--max-new-tokens", 1, "--json").json
    assert done["ids"] == notes
    assert (done["context"]["mode"], done["context"]["strategy"]) == ("merged", "query")
    assert [row["context_of"] for row in kvcag("ls", "--json").json] == [None, None]


def test_exact_answers_as_the_model_does_and_reads_the_store_once(kvcag: Kvcag, notes: list[str]) -> None:
    cold = kvcag("ask", "Who?", "--strategy", "exact", "--max-new-tokens", 12, "--json").json
    warm = kvcag("ask", "Who?", "--max-new-tokens", 12, "--json").json
    assert cold["answer"] == warm["answer"] == uncached(kvcag.environment["KVCAG_MODEL"], "Who?", 12)
    assert cold["context"]["encoded_tokens"] == cold["context"]["context_tokens"]
    assert warm["context"]["reused_tokens"] == len(NOTES)  # another process reads the instruction alone
    assert warm["context"]["mode"] == "prefix"
    assert warm["usage"]["completion_tokens"] == 12
    assert warm["ids"] == notes


def test_the_answer_is_on_stdout_and_the_reuse_on_stderr(kvcag: Kvcag, notes: list[str]) -> None:
    answer = kvcag("ask", "Who?", "--strategy", "exact", "--max-new-tokens", 8, "--json").json["answer"]
    done = kvcag("ask", "-", "--max-new-tokens", 8, input="Who?")  # auto finds the exact context
    assert done.out.strip() == answer
    assert f"{len(NOTES)} of 174 context tokens reused, {174 - len(NOTES)} encoded; first token after" in done.err


def test_a_store_that_changed_is_read_again_and_the_old_context_leaves(kvcag: Kvcag, notes: list[str]) -> None:
    kvcag("ask", "Who?", "--strategy", "exact", "--max-new-tokens", 1)
    kvcag("encode", write(kvcag.folder / "c.txt", "A third."))
    assert (
        kvcag("ask", "Who?", "--strategy", "exact", "--max-new-tokens", 1, "--json").json["context"]["mode"]
        == "encoded"
    )
    contexts = [row["context_of"] for row in kvcag("ls", "--json").json if row["context_of"]]
    assert [len(members) for members in contexts] == [3]


@pytest.mark.parametrize(("strategy", "recomputed"), [("rotate", 0), ("query", 34), ("full", 42)])
def test_chosen_items_are_merged(kvcag: Kvcag, notes: list[str], strategy: str, recomputed: int) -> None:
    chosen = ["--id", notes[1], "--id", notes[0]]
    done = kvcag("ask", "Who?", *chosen, "--strategy", strategy, "--max-new-tokens", 2, "--json").json
    assert done["ids"] == [notes[1], notes[0]]
    assert done["context"]["mode"] == "merged"
    assert done["context"]["recomputed_tokens"] == recomputed
    assert not any(row["context_of"] for row in kvcag("ls", "--json").json)


def test_chosen_by_source(kvcag: Kvcag, notes: list[str]) -> None:
    assert kvcag("ask", "Who?", "--source", "notes/sub", "--max-new-tokens", 1, "--json").json["ids"] == [notes[1]]
    assert kvcag("ask", "Who?", "--source", "nowhere").code == 1


def test_auto_says_why_it_merges_as_it_does(kvcag: Kvcag, notes: list[str]) -> None:
    assert "`kvcag doctor` measures" in kvcag("ask", "Who?", "--max-new-tokens", 1).err


def test_a_model_whose_caches_cannot_be_merged_reads_the_store_once(kvcag: Kvcag, tmp_path: Path) -> None:
    gpt2 = saved_model(tmp_path / "gpt2", model_type="gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=2048)
    kvcag("encode", "notes", "--model", gpt2)
    for encoded in (174, 174 - len(NOTES)):  # then the instruction alone
        done = kvcag("ask", "Who?", "--model", gpt2, "--max-new-tokens", 1, "--json")
        assert done.json["context"]["encoded_tokens"] == encoded, done.err


def test_one_item_is_its_own_exact_context(kvcag: Kvcag) -> None:
    kvcag("encode", "notes/a.md")
    done = kvcag("ask", "Who?", "--strategy", "exact", "--max-new-tokens", 1, "--json").json
    assert done["context"]["mode"] == "prefix"
    assert done["context"]["reused_tokens"] == len(NOTES.partition("Its")[0])  # all but the instruction
    assert len(kvcag("ls", "--json").json) == 1


def test_strategies_are_those_of_the_library() -> None:
    assert set(get_args(Strategy)) == set(STRATEGIES)


def test_a_damaged_context_or_item_is_named_and_encoded_again(kvcag: Kvcag, notes: list[str]) -> None:
    kvcag("ask", "Who?", "--strategy", "exact", "--max-new-tokens", 1)
    store = DiskStore(kvcag.folder / "kv")
    context = next(row["id"] for row in kvcag("ls", "--json").json if row["context_of"])
    for id in (context, notes[0]):
        data = bytearray(store.file(id).read_bytes())
        data[-1] ^= 1
        store.file(id).write_bytes(data)
    again = kvcag("ask", "Who?", "--max-new-tokens", 1)
    assert again.code == 0
    assert "encoding a document again" in again.err
    item = kvcag("ask", "Who?", "--id", notes[0], "--max-new-tokens", 1)
    assert item.code == 0
    assert str(store.file(notes[0])) in item.err
    assert kvcag("verify").code == 0


def test_items_of_another_model_are_refused_or_left_out(kvcag: Kvcag, notes: list[str], tmp_path: Path) -> None:
    other = saved_model(tmp_path / "other", seed=1)
    done = kvcag("ask", "Who?", "--model", other)
    assert done.code == 1
    assert "weights" in done.err
    own = kvcag("encode", write(tmp_path / "own.txt", "Own."), "--model", other, "--json").json["ids"]
    done = kvcag("ask", "Who?", "--model", other, "--max-new-tokens", 1, "--json")
    assert done.json["ids"] == own
    assert "2 items of other models left out" in done.err


def test_items_that_exceed_the_context_are_refused_with_advice(kvcag: Kvcag, notes: list[str]) -> None:
    for number in range(3):
        kvcag("encode", write(kvcag.folder / f"{number}.txt", f"{number} " * 400))
    done = kvcag("ask", "Who?")
    assert done.code == 2
    assert "5 items with the question have" in done.err
    assert "--id or --source" in done.err
    assert kvcag("ask", "Who?", "--source", "notes", "--max-new-tokens", 1).code == 0
    assert kvcag("ask", "Who?", "--source", "notes", "--max-new-tokens", 9000).code == 2


def test_nothing_to_ask_or_nothing_to_answer_from(kvcag: Kvcag) -> None:
    (kvcag.folder / "kv").mkdir()
    assert kvcag("ask", " ").code == 2
    done = kvcag("ask", "Who?")
    assert done.code == 1
    assert "kvcag encode" in done.err


# --- chat -------------------------------------------------------------------------------------------------------


def turns(kvcag: Kvcag, said: str, *arguments: object) -> list[dict]:
    done = kvcag("chat", "--max-new-tokens", 6, "--json", *arguments, input=said)
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


@pytest.fixture
def ascii_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes answers with a text for each token, since random bytes are not valid text."""
    letters = byte_tokenizer()("abcdefgh").input_ids
    draw = Sampler.draw
    monkeypatch.setattr(
        Sampler,
        "draw",
        lambda self, logits, history: logits.new_tensor(letters).long()[draw(self, logits, history) % 8],
    )


@pytest.mark.usefixtures("ascii_answers")
def test_each_turn_prefills_only_its_new_tokens(kvcag: Kvcag, notes: list[str]) -> None:
    first, second = turns(kvcag, "Who?\n\nWhere?\n", "--strategy", "exact")
    assert [first["question"], second["question"]] == ["Who?", "Where?"]
    assert first["context"]["encoded_tokens"] == 174
    assert second["context"]["reused_tokens"] == second["context"]["context_tokens"] == 174
    assert second["usage"]["cached_tokens"] >= first["usage"]["prompt_tokens"] + 5  # the answer's last is not run yet
    assert second["usage"]["created_tokens"] <= len("*\n*user\nWhere?*\n*assistant\n") + 1
    assert first["answer"] == kvcag("ask", "Who?", "--max-new-tokens", 6, "--json").json["answer"]


@pytest.mark.parametrize("strategy", ["auto", "exact", "query", "rotate"])
@pytest.mark.usefixtures("ascii_answers")
def test_a_turn_prefills_its_own_tokens_and_no_others(
    kvcag: Kvcag, notes: list[str], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts tokens in the model's forward passes."""
    lengths: list[int] = []
    predict = HFEngine.predict
    monkeypatch.setattr(HFEngine, "predict", lambda *given: lengths.append(len(given[1])) or predict(*given))
    asked = [f"Question {number}?" for number in range(4)]
    turns(kvcag, "\n".join(asked), "--strategy", strategy)
    passes = [lengths[at : at + 6] for at in range(len(lengths) - 4 * 6, len(lengths), 6)]
    markup = len(byte_tokenizer()("<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n").input_ids)
    for question, (prefilled, *steps) in zip(asked[1:], passes[1:], strict=True):
        assert prefilled == 1 + markup + len(question)  # the last token of an answer runs with the next turn
        assert steps == [1] * 5


def test_reset_forgets_and_undo_takes_back(kvcag: Kvcag, notes: list[str]) -> None:
    first, again = turns(kvcag, "Who?\n/reset\nWho?\n")
    assert first["answer"] == again["answer"]
    first, second, after_undo = turns(kvcag, "Who?\nWhere?\n/undo\nWhere?\n")
    assert second["answer"] == after_undo["answer"]
    assert len(turns(kvcag, "Who?\n/exit\nWhere?\n")) == 1


def test_a_chat_over_merged_items(kvcag: Kvcag, notes: list[str]) -> None:
    first, second = turns(kvcag, "Who?\nWhere?\n", "--source", "notes")
    assert first["context"]["strategy"] == "query"
    assert first["context"]["recomputed_tokens"] == 34
    assert second["usage"]["cached_tokens"] >= 174 + 6


def test_each_turn_reports_reused_tokens(kvcag: Kvcag, notes: list[str]) -> None:
    done = kvcag("chat", "--strategy", "exact", "--max-new-tokens", 6, input="Who?\nWhere?\n/context\n/what\n")
    lines = done.err.splitlines()
    assert any(line.startswith("0 of 174 context tokens reused, 174 encoded; first token after") for line in lines)
    assert any("tokens reused, " in line and " read; first token after" in line for line in lines)
    assert "notes/a.md" in done.err
    assert "/undo" in done.err


def test_a_turn_that_does_not_fit_ends_a_script_with_2(kvcag: Kvcag, notes: list[str]) -> None:
    assert kvcag("chat", "--max-new-tokens", 3000, input="Who?\n").code == 2


def test_asking_files_encodes_new_files_and_names_those_that_fit_best(kvcag: Kvcag) -> None:
    for number in range(5):
        write(kvcag.folder / "many" / f"{number}.txt", f"Chapter {number} is about winter.")
    write(kvcag.folder / "many" / "keeper.txt", "The keeper of the lighthouse is called Ode.")
    first = kvcag("ask", "many", "Who is the keeper?", "--k", 2, "--max-new-tokens", 2, "--json").json
    assert len(first["ids"]) == 2
    assert len(kvcag("ls", "--json").json) == 6, "all files are kept"
    second = kvcag("ask", "many", "Who is the keeper?", "--k", 2, "--max-new-tokens", 2)
    assert "keeper.txt" in second.err
    assert "s to the first word (about" in second.err
    assert re.search(r"(× |no )faster, merged \(query\)$", second.err, re.MULTILINE)
    assert kvcag("encode", "many", "--json").json["encoded"] == 0, "ask and encode keep the same items"
    changed = write(kvcag.folder / "many" / "keeper.txt", "The keeper of the lighthouse is called Una.")
    assert kvcag("ask", changed, "Who?", "--max-new-tokens", 2, "--json").json["ids"] != first["ids"]


def test_asking_files_that_are_not_there_is_refused_before_the_model_is_loaded(kvcag: Kvcag) -> None:
    done = kvcag("ask", "no-such-folder", "Who?")
    assert done.code == 2
    assert "no-such-folder" in done.err


def test_nothing_is_encoded_twice_between_encode_and_ask(kvcag: Kvcag) -> None:
    """`ask` uses a file in the parts in which `encode` stored it, and the reverse."""
    long = " ".join(f"Sentence {number} of many." for number in range(60))
    for name, cut in (("whole", []), ("cut", ["--split", 300])):
        write(kvcag.folder / name / "a.txt", f"{name} {long}")
        assert kvcag("encode", name, *cut, "--json").json["encoded"] > 0
        before = len(kvcag("ls", "--json").json)
        assert kvcag("ask", name, "Which?", "--k", 1, "--max-new-tokens", 1, "--json").code == 0
        assert len(kvcag("ls", "--json").json) == before, name
    write(kvcag.folder / "asked" / "a.txt", f"asked {long}")
    kvcag("ask", "asked", "Which?", "--k", 1, "--max-new-tokens", 1, "--json")
    assert kvcag("encode", "asked", "--json").json["encoded"] == 0
    write(kvcag.folder / "cut" / "a.txt", f"cut {long} One more.")
    before = len(kvcag("ls", "--json").json)
    kvcag("ask", "cut", "Which?", "--k", 1, "--max-new-tokens", 1, "--json")
    assert len(kvcag("ls", "--json").json) > before, "a changed file is encoded"
