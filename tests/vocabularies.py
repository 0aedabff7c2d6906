"""Tokenizers of five families, without a network: two that llama-index-core carries, three trained on a few pages."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import llama_index.core
import pytest
import tiktoken
import tiktoken_ext.openai_public as public
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvcag.demo.corpus import python_topics
from kvcag.testing import CHATML, SPECIAL, byte_tokenizer

TRAINED = ("gpt2", "llama2", "gemma")
FAMILIES = (*TRAINED, "cl100k", "o200k")
"""Llama 3 and Qwen split text as cl100k does, gpt-oss as o200k, SmolLM as GPT-2, Mistral as Llama 2."""


@cache
def tokenizer_of(family: str) -> Any:
    """A tokenizer with ChatML's special tokens and template."""
    if family in ("cl100k", "o200k"):
        return Tiktoken(family)
    return _trained(family)


class Tiktoken:
    """One of OpenAI's encodings, as far as prompts need a Hugging Face tokenizer."""

    chat_template = CHATML
    bos_token_id = None
    all_special_tokens = SPECIAL

    def __init__(self, name: str) -> None:
        carried = Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TIKTOKEN_CACHE_DIR", str(carried))
            made = getattr(public, f"{name}_base")()
        special = {token: made["mergeable_ranks"].__len__() + 100 + at for at, token in enumerate(SPECIAL)}
        self._encoding = tiktoken.Encoding(**{**made, "special_tokens": special})
        self.apply_chat_template = byte_tokenizer().apply_chat_template

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self._encoding.encode(text, allowed_special="all")}

    def decode(self, token_ids: list[int]) -> str:
        return self._encoding.decode(token_ids)


def _trained(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's; or SentencePiece's BPE, which Llama 2 gives a space before the first word."""
    pages = [topic.text for topic in python_topics()]
    if family == "gpt2":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=SPECIAL, initial_alphabet=alphabet)
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        space = normalizers.Replace(" ", "▁")
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if family == "llama2" else space
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("\n+|[^\n]+"), "isolated")  # while it is trained
        tokens = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=tokens)
    backend.train_from_iterator(pages, trainer)
    if family != "gpt2":
        backend.pre_tokenizer = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = CHATML
    return tokenizer
