"""`kvcag encode`, `sync`, `ls`, `inspect` and `rm` over a store on disk."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kvcag import KVCacheMemory
from kvcag.cli.common import INSTRUCTION
from kvcag.stores.disk import DiskStore
from tests.commands import Kvcag, saved_model, write


def sources(kvcag: Kvcag, *arguments: object) -> list[str]:
    return sorted(Path(row["source"]).name for row in kvcag("ls", "--json", *arguments).json if not row["context_of"])


def test_stored_items_are_not_encoded_again(kvcag: Kvcag) -> None:
    first = kvcag("encode", "notes", "--json").json
    assert (first["encoded"], first["kept"]) == (2, 0)
    assert first["tokens"] == len(
        "The lighthouse of Varn is painted green.\n\nIts keeper is called Ode.\n\nShe has a dog.\n\n"
    )
    again = kvcag("encode", "notes", "--json").json
    assert (again["encoded"], again["kept"], again["ids"]) == (0, 2, first["ids"])
    assert sources(kvcag) == ["a.md", "b.txt"]


def test_skipped_files_are_named_on_stderr_and_in_the_json(kvcag: Kvcag) -> None:
    write(kvcag.folder / "notes" / "blank.txt", "")
    done = kvcag("encode", "notes", "--json")
    assert done.code == 0
    assert [Path(each["path"]).name for each in done.json["skipped"]] == ["blank.txt"]
    assert "blank.txt: the file is empty" in done.err


def test_long_files_are_cut_and_an_uncut_one_that_does_not_fit_is_refused_before_any_work(kvcag: Kvcag) -> None:
    write(kvcag.folder / "notes" / "z.txt", " ".join(f"Sentence {number} of many." for number in range(200)))
    done = kvcag("encode", "notes")
    assert done.code == 2
    assert "z.txt" in done.err
    assert "--split" in done.err
    assert sources(kvcag) == []  # notes/a.md would have fitted
    parts = kvcag("encode", "notes/z.txt", "--split", 500, "--json").json["ids"]
    assert len(parts) > 8
    assert {kvcag("inspect", id, "--json").json["metadata"]["parts"] for id in parts[:2]} == {len(parts)}


def test_sync_encodes_keeps_and_drops_and_dry_run_shows_it(kvcag: Kvcag) -> None:
    kvcag("encode", "notes")
    other = write(kvcag.folder / "other.md", "Another folder's.")
    kvcag("encode", other)
    write(kvcag.folder / "notes" / "a.md", "The lighthouse of Varn is painted blue.")
    (kvcag.folder / "notes" / "sub" / "b.txt").unlink()
    for dry in (True, False):
        done = kvcag("sync", "notes", "--json", *(["--dry-run"] if dry else []))
        assert (done.json["encoded"], done.json["kept"], done.json["dropped"]) == (1, 0, 2), done.err
        assert sources(kvcag) == (["a.md", "b.txt", "other.md"] if dry else ["a.md", "other.md"])
    assert kvcag("sync", "notes", "--json").json["kept"] == 1


def test_sync_drops_nothing_of_another_model_or_of_a_file_that_cannot_be_read(kvcag: Kvcag) -> None:
    other = saved_model(kvcag.folder / "other", seed=1)
    kvcag("encode", "notes")
    kvcag("encode", "notes", "--model", other)
    assert kvcag("encode", "notes", "--instruction", "Be brief.", "--json").json["encoded"] == 0
    write(kvcag.folder / "notes" / "a.md", b"\xff\xfe")
    (kvcag.folder / "notes" / "sub" / "b.txt").unlink()
    assert kvcag("sync", "notes", "--json").json["dropped"] == 1  # b.txt, of this model
    assert sources(kvcag) == ["a.md", "a.md", "b.txt"]


def test_sync_after_a_question_drops_the_context_with_the_text_it_held(kvcag: Kvcag) -> None:
    kvcag("encode", "notes")
    kvcag("ask", "Who?", "--strategy", "exact", "--max-new-tokens", 1)
    assert kvcag("sync", "notes", "--json").json["dropped"] == 0
    assert len(kvcag("ls", "--json", "--source", "notes/a.md").json) == 2  # the item, and the context that holds it
    (kvcag.folder / "notes" / "a.md").unlink()
    assert kvcag("sync", "notes", "--json").json["dropped"] == 1
    assert [row["context_of"] for row in kvcag("ls", "--json").json] == [None]


def test_a_store_on_a_read_only_file_system_is_read_and_not_written(kvcag: Kvcag) -> None:
    id = kvcag("encode", "notes", "--json").json["ids"][0]
    mounted = kvcag.folder / "mounted"
    mounted.mkdir()
    if subprocess.run(["mount", "--bind", kvcag.folder / "kv", mounted], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", mounted], check=True)
        assert kvcag("inspect", id, "--store", mounted).code == 0
        assert kvcag("ask", "Who?", "--store", mounted, "--id", id, "--max-new-tokens", 1).code == 0
        whole = kvcag("ask", "Who?", "--store", mounted, "--strategy", "exact", "--max-new-tokens", 1)
        assert (whole.code, "not stored" in whole.err) == (0, True)
        for refused in (["rm", id], ["encode", "README.md"]):
            write(kvcag.folder / "README.md", "New.")
            done = kvcag(*refused, "--store", mounted)
            assert done.code == 3
            assert "read-only" in done.err
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_a_dry_run_makes_no_store(kvcag: Kvcag) -> None:
    assert kvcag("sync", "notes", "--dry-run", "--json").json["encoded"] == 2
    assert not (kvcag.folder / "kv").exists()


def test_ls_filters_and_sorts(kvcag: Kvcag) -> None:
    kvcag("encode", "notes")
    assert sources(kvcag, "--source", "notes/sub") == ["b.txt"]
    assert sources(kvcag, "--source", "*.md") == ["a.md"]
    assert sources(kvcag, "--older-than", "1d") == []
    assert [row["tokens"] for row in kvcag("ls", "--json", "--sort", "tokens").json] == [43, 42]
    shown = kvcag("ls", "--sort", "source")
    assert shown.out.index("notes/a.md") < shown.out.index("notes/sub/b.txt")
    assert "2 items" in shown.err


def test_ls_of_nothing_is_an_empty_list_and_makes_no_folder(kvcag: Kvcag) -> None:
    kvcag.environment.pop("KVCAG_STORE")
    done = kvcag("ls", "--json")
    assert (done.code, done.json) == (0, [])
    assert "there are no items yet" in done.err
    assert not (kvcag.folder / "cache").exists()
    write(kvcag.folder / "elsewhere" / "x.txt", "")
    assert kvcag("ls", "--store", "elsewhere").code == 0
    assert [path.name for path in (kvcag.folder / "elsewhere").iterdir()] == ["x.txt"]


def test_namespaces_share_nothing(kvcag: Kvcag) -> None:
    kvcag("encode", "notes", "--namespace", "ann")
    assert sources(kvcag) == []
    assert sources(kvcag, "--namespace", "ann") == ["a.md", "b.txt"]
    assert "in this namespace (1 other may have some)" in kvcag("ls").err
    assert kvcag("ask", "Who?").code == 1


def test_inspect_shows_what_made_an_item_and_takes_a_beginning_of_its_id(kvcag: Kvcag) -> None:
    id = kvcag("encode", "notes/a.md", "--json").json["ids"][0]
    shown = kvcag("inspect", id.removeprefix("kv:sha256:")[:6], "--json").json
    assert shown["id"] == id
    assert shown["shape"] == "(1, 2, 42, 8)"
    assert shown["dtype"] == "float32"
    assert shown["fingerprint"]["architecture"] == "LlamaForCausalLM"
    assert len(shown["checksums"]) == 7  # token ids, and keys and values of three layers
    text = kvcag("inspect", id)
    assert "all 7 match" in text.out
    assert "painted green" in text.out


def test_inspect_of_a_damaged_or_unknown_item_is_1_and_of_an_ambiguous_id_2(kvcag: Kvcag) -> None:
    id = kvcag("encode", "notes", "--json").json["ids"][0]
    assert kvcag("inspect", "kv:sha256:").code == 2
    assert kvcag("inspect", "zzzz").code == 1
    file = DiskStore(kvcag.folder / "kv").file(id)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = kvcag("inspect", id)
    assert done.code == 1
    assert "checksum" in done.err
    assert kvcag("verify").code == 1


def test_a_file_whose_header_is_cut_is_counted_by_ls_and_cleared_by_verify(kvcag: Kvcag) -> None:
    id = kvcag("encode", "notes", "--json").json["ids"][0]
    file = DiskStore(kvcag.folder / "kv").file(id)
    file.write_bytes(file.read_bytes()[:100])
    assert "1 file cannot be read" in kvcag("ls").err
    assert kvcag("verify", "--repair", "--json").json["damaged"]
    assert kvcag("encode", "notes", "--json").json["encoded"] == 1


def test_rm_deletes_the_named_items_and_nothing_else(kvcag: Kvcag) -> None:
    first, _ = kvcag("encode", "notes", "--json").json["ids"]
    assert kvcag("rm", first, "--json").json["deleted"] == [first]
    assert sources(kvcag) == ["b.txt"]
    assert kvcag("rm", "zzzz").code == 1
    assert kvcag("rm", "--source", "nowhere").code == 1
    assert kvcag("rm").code == kvcag("rm", first, "--all").code == 2
    assert sources(kvcag) == ["b.txt"]


def test_rm_of_many_wants_a_yes(kvcag: Kvcag) -> None:
    kvcag("encode", "notes")
    done = kvcag("rm", "--source", "notes")
    assert done.code == 2
    assert "--yes" in done.err
    assert len(sources(kvcag)) == 2
    assert kvcag("rm", "--all", "--yes").code == 0
    assert sources(kvcag) == []


def test_a_deleted_text_leaves_the_contexts_that_held_it_too(kvcag: Kvcag) -> None:
    first, second = kvcag("encode", "notes", "--json").json["ids"]
    kvcag("ask", "Who?", "--strategy", "exact", "--max-new-tokens", 1)
    assert sum(bool(row["context_of"]) for row in kvcag("ls", "--json").json) == 1
    assert kvcag("rm", first).code == 2  # two items: it and the context
    assert len(kvcag("rm", first, "--yes", "--json").json["deleted"]) == 2
    assert [row["id"] for row in kvcag("ls", "--json").json] == [second]


def test_the_command_line_and_python_find_each_others_items(kvcag: Kvcag) -> None:
    ids = kvcag("encode", "notes", "--json").json["ids"]
    memory = KVCacheMemory(kvcag.environment["KVCAG_MODEL"], "kv", INSTRUCTION)
    assert memory.add("The lighthouse of Varn is painted green.") == ids[:1]
    [new] = memory.add("The harbour opens at five.")
    write(kvcag.folder / "notes" / "c.md", "The harbour opens at five.\n")
    again = kvcag("sync", "notes", "--json").json
    assert (again["encoded"], again["kept"], again["ids"][1]) == (0, 3, new)
    done = kvcag("ask", "Who?", "--max-new-tokens", 1, "--json").json
    assert set(done["ids"]) == {*ids, new}
    assert done["context"]["mode"] == "merged"
    assert done["context"]["encoded_tokens"] < 90  # the instruction; the documents are found
    assert len(memory) == 3


def test_a_context_made_in_python_is_no_second_copy_of_its_texts(kvcag: Kvcag) -> None:
    ids = kvcag("encode", "notes", "--json").json["ids"]
    memory = KVCacheMemory(kvcag.environment["KVCAG_MODEL"], "kv", INSTRUCTION)
    text = "The lighthouse of Varn is painted green."
    context = memory.create_context([text, "It is old."], INSTRUCTION)
    assert kvcag("ask", "Who?", "--max-new-tokens", 1, "--json").json["ids"] == ids
    assert kvcag("ask", "Who?", "--id", context, "--max-new-tokens", 1, "--json").json["ids"] == [context]
    assert set(kvcag("rm", ids[0], "--yes", "--json").json["deleted"]) == {ids[0], context}


def test_the_library_s_purge_finds_contexts_by_text_and_by_source(kvcag: Kvcag) -> None:
    for purged in ("The lighthouse of Varn is painted green.", str(kvcag.folder / "notes" / "a.md")):
        kvcag("encode", "notes")
        kvcag("ask", "Who?", "--strategy", "exact", "--max-new-tokens", 1)
        assert len(DiskStore(kvcag.folder / "kv").purge(purged).ids) == 2
        assert sources(kvcag) == ["b.txt"]


@pytest.mark.parametrize("age", ["5", "d", "-1d", "1y"])
def test_an_age_without_a_unit_is_refused(kvcag: Kvcag, age: str) -> None:
    done = kvcag("ls", "--store", ".", f"--older-than={age}")
    assert done.code == 2
    assert "7d" in done.err
