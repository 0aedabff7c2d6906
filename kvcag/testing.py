"""Stand-ins for tests: an engine without weights, a byte tokenizer and tiny random models.

`EchoEngine` replaces only the model: it uses a real tokenizer and a real chat template, stop strings and the token
budget, and counts usage. `tiny_model` and `byte_tokenizer` make an `HFEngine` in milliseconds:

```python
engine = HFEngine(tiny_model(), byte_tokenizer())
```
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Generator
from functools import cached_property
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import Cache

from kvcag.chat_template import ChatTemplate, Prompt, common_length
from kvcag.core import Chunk, ContextPrompt, EncodedItem, FinishReason, MergedContext, Usage
from kvcag.engines.base import Engine, Sampling
from kvcag.engines.constrain import Constraint, ConstraintCompiler, ConstraintLike
from kvcag.engines.decode import Account, Detokenizer, KnownPrefix, StopStrings, ThinkingFilter
from kvcag.errors import EmptyPromptError, UnsupportedModelError
from kvcag.fingerprint import ModelFingerprint

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
"""The special tokens of `byte_tokenizer`."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of `byte_tokenizer`."""

SMALL: dict[str, Any] = {
    "vocab_size": 256 + len(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": 258,
}
"""The configuration of `tiny_model`."""

_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)

Answer = Callable[[str], str]
"""A function from the prompt's text, in ChatML, to the answer."""


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte, the special tokens of ChatML, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(
    model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: object
) -> PreTrainedModel:
    """Make a random model of three small layers, in evaluation mode.

    Args:
        model_type: a model family of transformers, such as `"llama"` or `"qwen3"`.
        seed: of the weights. Sets torch's global seed.
        dtype: of the weights.
        **config: settings that override those of `SMALL`.
    """
    torch.manual_seed(seed)
    made = AutoConfig.for_model(model_type, **{**SMALL, **config})
    return cast("PreTrainedModel", AutoModelForCausalLM.from_config(made).to(dtype).eval())


def last_user_message(prompt: str) -> str:
    """Return the last user message, or the whole prompt if it has no turns."""
    said = [content for role, content in _TURN.findall(prompt) if role == "user"]
    return said[-1] if said else prompt


def whole_prompt(prompt: str) -> str:
    """Return one line `role: content` per turn, or the whole prompt if it has no turns."""
    return "\n".join(f"{role}: {content}" for role, content in _TURN.findall(prompt)) or prompt


class EchoEngine(Engine):
    """An engine without weights, for tests. By default it answers with the last user message.

    One token is one byte. The engine records its prompts: the prefix that a prompt shares with an earlier prompt counts
    as cached, as it does with a model. Safe to use from several threads.

    Args:
        answer: returns the answer to a prompt: `last_user_message`, `whole_prompt`, or your own function.
        context_length: the most tokens, prompt and answer together.

    Attributes:
        prompts: the namespace and the token ids of each prompt.
    """

    item_type = EncodedItem

    def __init__(self, answer: Answer = last_user_message, *, context_length: int = 1 << 16) -> None:
        self.answer = answer
        self._context_length = context_length
        self.defaults = {}
        self.tokenizer = byte_tokenizer()
        self.template = ChatTemplate(self.tokenizer)
        self.prompts: list[tuple[str, tuple[int, ...]]] = []
        self._lock = threading.Lock()

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together."""
        return self._context_length

    def check_fits(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """Return how many tokens may be generated: `max_new_tokens`, or all that fit."""
        return super().check_fits(prompt_tokens, max_new_tokens or max(self.context_length - prompt_tokens, 1))

    @property
    def model_name(self) -> str:
        """`echo`."""
        return "echo"

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """The fingerprint of a model without weights."""
        return ModelFingerprint(
            model_name=self.model_name,
            architecture=type(self).__name__,
            dtype="uint8",
            geometry="0x0x0",
            weights="",
            tokenizer="bytes",
            template=hashlib.sha256(CHATML.encode()).hexdigest(),
        )

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        past_key_values: Cache | MergedContext | ContextPrompt | None = None,
        *,
        constraint: ConstraintLike | None = None,
        namespace: str = "",
        started: float | None = None,
        accept_merged: bool = False,
    ) -> Generator[Chunk, None, None]:
        """Answer a prompt, one chunk per byte. An answer that breaks the constraint becomes the shortest valid one.

        Raises:
            ConstraintError: the constraint cannot be used, or no valid answer fits the budget.
            ContextLengthError: the prompt with `max_new_tokens` exceeds `context_length`.
            EmptyPromptError: the prompt has no tokens.
            UnsupportedModelError: a cache was passed.
        """
        started = started or time.perf_counter()
        if past_key_values is not None:
            raise UnsupportedModelError("an EchoEngine has no caches. Pass the whole prompt, without past_key_values.")
        if not prompt.token_ids:
            raise EmptyPromptError("the prompt has no tokens")
        budget = self.check_fits(len(prompt.token_ids), sampling.max_new_tokens)
        text = str(self.tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False))
        compiled = self.constrain(constraint, budget, prompt.thinking) if constraint is not None else None
        answer_ids = self.template.encode(self.answer(text))
        if compiled is not None and not compiled.accepts(answer_ids):
            answer_ids = compiled.shortest
        cached = self._remember(prompt.token_ids, namespace)
        return self._say(prompt, answer_ids, budget, sampling, cached, started)

    def constrain(self, constraint: ConstraintLike, max_new_tokens: int, thinking: bool = False) -> Constraint:
        """Compile a constraint and check that it fits the budget, as `HFEngine.constrain` does."""
        compiled = self._compiler.compile(constraint, thinking=thinking)
        compiled.check_fits(max_new_tokens)
        return compiled

    @cached_property
    def _compiler(self) -> ConstraintCompiler:
        return ConstraintCompiler(self.tokenizer, len(self.tokenizer), [self.tokenizer.eos_token_id])

    def _say(
        self,
        prompt: Prompt,
        answer_ids: tuple[int, ...],
        budget: int,
        sampling: Sampling,
        cached: int,
        started: float,
    ) -> Generator[Chunk, None, None]:
        detokenizer, stop = Detokenizer(self.tokenizer), StopStrings(sampling.stop)
        thinking = ThinkingFilter(prompt.thinking, strips=sampling.strip_thinking)
        first_at, said = time.perf_counter(), 0
        context = Account.of(prompt, None, KnownPrefix(cached), 0, started).context

        def usage() -> Usage:
            created = len(prompt.token_ids) - cached
            now = time.perf_counter()
            return Usage(len(prompt.token_ids), cached, created, said, first_at - started, now - started, context)

        for token in answer_ids[:budget]:
            said += 1
            text = stop.push(thinking.push(detokenizer.push(token)))
            if stop.found:
                yield Chunk(text, (token,), "stop", usage(), thinking.take())
                return
            yield Chunk(text, (token,), thinking=thinking.take())
        finish: FinishReason = "length" if len(answer_ids) > budget else "stop"
        text = stop.push(thinking.push(detokenizer.flush()) + thinking.flush())
        text += "" if stop.found else stop.flush()
        yield Chunk(text, (), "stop" if stop.found else finish, usage(), thinking.take())

    def _remember(self, token_ids: tuple[int, ...], namespace: str) -> int:
        """Record a prompt, and return the length of the longest prefix it shares with an earlier prompt."""
        with self._lock:
            shared = [common_length(token_ids, known) for whose, known in self.prompts if whose == namespace]
            self.prompts.append((namespace, token_ids))
        return min(max(shared, default=0), len(token_ids) - 1)
