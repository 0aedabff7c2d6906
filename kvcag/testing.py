"""An engine without weights: it answers from the prompt it is given, in milliseconds.

As httpx's `MockTransport` stands in for a server, `EchoEngine` stands in for a model wherever an engine is taken, and
nothing else is replaced: prompts go through a real tokenizer and a real chat template, answers through stop strings and
the token budget, and usage is counted.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Generator
from functools import cached_property
from itertools import takewhile

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.cache_utils import Cache

from kvcag.chat_template import ChatTemplate, Prompt
from kvcag.core import Chunk, ContextPrompt, EncodedItem, FinishReason, MergedContext, Usage
from kvcag.engines.base import Engine
from kvcag.engines.constrain import Constraint, ConstraintCompiler, ConstraintLike
from kvcag.engines.decode import Detokenizer, StopStrings
from kvcag.engines.sampling import Sampling
from kvcag.errors import EmptyPromptError, UnsupportedModelError
from kvcag.fingerprint import ModelFingerprint

_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Answer = Callable[[str], str]
"""Gets the prompt as the model would read it, ChatML, and returns the answer."""


def last_user_message(prompt: str) -> str:
    """What the user said last; the whole prompt where it has no turns."""
    said = [content for role, content in _TURN.findall(prompt) if role == "user"]
    return said[-1] if said else prompt


def whole_prompt(prompt: str) -> str:
    """Every turn as `role: content`, a line each; the whole prompt where it has no turns."""
    return "\n".join(f"{role}: {content}" for role, content in _TURN.findall(prompt)) or prompt


class EchoEngine(Engine):
    """Answers with what the user said last, or as `answer` says. One token is one byte.

    Remembers the prompts it was given, so that the beginning that a prompt shares with an earlier one counts as cached,
    as it would with a model. Safe to use from several threads.

    Args:
        answer: makes the answer: `last_user_message`, `whole_prompt`, or a function of your own.
        context_length: the most tokens, prompt and answer together.
    """

    item_type = EncodedItem

    def __init__(self, answer: Answer = last_user_message, *, context_length: int = 1 << 16) -> None:
        self.answer = answer
        self._context_length = context_length
        self.defaults = {}
        self.tokenizer = _byte_tokenizer()
        self.template = ChatTemplate(self.tokenizer)
        self.prompts: list[tuple[str, tuple[int, ...]]] = []
        self._lock = threading.Lock()

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together."""
        return self._context_length

    def check_fits(self, prompt_tokens: int, max_new_tokens: int | None) -> int:
        """How many tokens may be generated: all that fit, unless fewer are asked for."""
        return super().check_fits(prompt_tokens, max_new_tokens or max(self.context_length - prompt_tokens, 1))

    @property
    def model_name(self) -> str:
        """`echo`."""
        return "echo"

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """That of a model without weights."""
        return ModelFingerprint(
            model_name=self.model_name,
            architecture=type(self).__name__,
            dtype="uint8",
            geometry="0x0x0",
            rope="{}",
            weights="",
            tokenizer="bytes",
            template=hashlib.sha256(_CHATML.encode()).hexdigest(),
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
        """Answer a prompt, a chunk a byte; the shortest that fits where the answer breaks a constraint.

        Raises:
            ConstraintError: the constraint cannot be used, or nothing that satisfies it fits the budget.
            ContextLengthError: the prompt with `max_new_tokens` exceeds `context_length`.
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
        first_at, said = time.perf_counter(), 0

        def usage() -> Usage:
            created = len(prompt.token_ids) - cached
            now = time.perf_counter()
            return Usage(len(prompt.token_ids), cached, created, said, first_at - started, now - started)

        for token in answer_ids[:budget]:
            said += 1
            text = stop.push(detokenizer.push(token))
            if stop.found:
                yield Chunk(text, (token,), "stop", usage())
                return
            yield Chunk(text, (token,))
        finish: FinishReason = "length" if len(answer_ids) > budget else "stop"
        text = stop.push(detokenizer.flush())
        yield Chunk(text if stop.found else text + stop.flush(), (), "stop" if stop.found else finish, usage())

    def _remember(self, token_ids: tuple[int, ...], namespace: str) -> int:
        """Keep a prompt; how many of its tokens an earlier one began with."""
        with self._lock:
            shared = [_common(token_ids, known) for whose, known in self.prompts if whose == namespace]
            self.prompts.append((namespace, token_ids))
        return min(max(shared, default=0), len(token_ids) - 1)


def _common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ChatML's special tokens and its template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL})
    tokenizer.chat_template = _CHATML
    return tokenizer
