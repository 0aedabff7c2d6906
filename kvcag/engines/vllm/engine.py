"""The engine over a vLLM server, or any other that speaks OpenAI's completions API."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from os import PathLike, fspath
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from typing_extensions import Self

from kvcag.chat_template import ChatTemplate, Message, Prompt
from kvcag.core import (
    Chunk,
    ContextPrompt,
    MergedContext,
    MergeReport,
    ServedContext,
    Usage,
    VLLMKVCacheItem,
    ids_digest,
)
from kvcag.engines.base import Engine, context_ids
from kvcag.engines.constrain import ConstraintLike, ServerConstraint
from kvcag.engines.sampling import Sampling
from kvcag.engines.vllm.answer import Asked, salt_of
from kvcag.engines.vllm.client import HTTPClient
from kvcag.engines.vllm.constrain import server_constraint
from kvcag.engines.vllm.order import DocumentOrder, Ordering
from kvcag.engines.vllm.server import PROBE, Server
from kvcag.engines.vllm.tokenizer import ServerTokenizer
from kvcag.engines.vllm.warm import Preloads
from kvcag.errors import (
    EmptyPromptError,
    FingerprintMismatchError,
    ServerError,
    ServerUnavailableError,
    TokenMismatchError,
    UnsupportedModelError,
    WarnOnce,
)
from kvcag.fingerprint import ModelFingerprint

if TYPE_CHECKING:
    import httpx


class VLLMEngine(Engine):
    """Answers from a vLLM server, whose automatic prefix cache keeps the keys and values.

    Prompts are sent as token ids, head first, documents in order, question last: what begins like an earlier prompt is
    not read again. Nothing is merged. Making an engine needs no server; the first use does. Safe to use from several
    threads; close it, or use it in a `with` block.

    ```python
    engine = VLLMEngine("http://127.0.0.1:8000/v1", tokenizer="Qwen/Qwen3-8B")
    llm = ChatKVCAG(engine=engine)
    ```

    Any server with OpenAI's `/v1/completions` works; what it lacks is said once, with a `ServerWarning`.

    Args:
        base_url: where the API is, with `/v1` or without.
        model: the model's name on the server; by default the only one that it serves.
        tokenizer: a hub id, a folder or a live tokenizer, which has to be the server's and is compared with it once.
            None asks the server (`/tokenize`, vLLM's), a request for every text that was not asked for lately.
        api_key: sent as a bearer token.
        context_length: the most tokens, prompt and answer together; by default what the server says.
        document_order: `"given"`; `"canonical"`, by their content, so that the same documents in any order are the same
            prompt; or `"frequent"`, those first that are asked for most often, so that more prompts begin alike. For
            documents that may stand in any order and end with a separator, as those of the adapters do.
        salt_secret: a secret of this application. Namespaces' salts are made from it, so that nobody who can ask the
            server can make one, and this application shares no hits with others.
        template_variables: passed to the chat template, as `enable_thinking=False`.
        defaults: settings of every call that gives no others, as `{"temperature": 0.7}`.
        timeout: seconds of silence, before the first token or between two, after which an answer is given up.
        connect_timeout: seconds in which a connection must be made.
        max_retries: how often a request that got no answer is made again.
        retry_wait: seconds before the first time; doubled before each other.
        client: an `httpx.Client` of your own, for certificates, proxies or headers. Its timeouts count, and it is not
            closed here.

    Raises:
        MissingExtraError: the extra `vllm` is not installed.
        InvalidInputError: `base_url` is no URL, or a default is unknown or out of range.
    """

    item_type = VLLMKVCacheItem

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000/v1",
        model: str = "",
        *,
        tokenizer: str | PathLike[str] | PreTrainedTokenizerBase | None = None,
        api_key: str | None = None,
        context_length: int | None = None,
        document_order: DocumentOrder = "given",
        salt_secret: str = "",
        template_variables: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        connect_timeout: float = 5.0,
        max_retries: int = 3,
        retry_wait: float = 0.5,
        client: httpx.Client | None = None,
    ) -> None:
        Sampling.of(**(defaults or {}))
        self.defaults = dict(defaults or {})
        self.ordering = Ordering(document_order)
        self.wire = HTTPClient(
            base_url,
            api_key=api_key,
            timeout=timeout,
            connect_timeout=connect_timeout,
            max_retries=max_retries,
            retry_wait=retry_wait,
            client=client,
        )
        self._model, self._context_length = model, context_length
        self._given_tokenizer = tokenizer
        self._template_variables = template_variables
        self._salt_secret = salt_secret
        self._notices = WarnOnce()
        self.server = Server(self.wire, model, self._notices)
        self._preloads = Preloads(self.wire, self._resend, self.server.forget, self._notices)

    def close(self) -> None:
        """Close the connections. No thread is left."""
        self._preloads.close()
        self.wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what it is --------------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """The model's name on the server."""
        return self._model or self.server.facts.model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the prompts: the one given, or the server's."""
        given = self._given_tokenizer
        if given is None:
            return cast("PreTrainedTokenizerBase", ServerTokenizer(self.wire, self.model_name))
        if isinstance(given, str | PathLike):
            return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(fspath(given)))
        return given

    @cached_property
    def template(self) -> ChatTemplate:  # type: ignore[override]
        """Makes prompts of messages."""
        return ChatTemplate(self.tokenizer, self._template_variables)

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """Which model this is, as far as can be told from here: its name, and its tokens of a text and of a chat."""
        return ModelFingerprint(
            model_name=self.model_name,
            architecture=type(self).__name__,
            dtype="the server's",
            geometry="",
            rope="{}",
            weights=hashlib.sha256(self.model_name.encode()).hexdigest(),
            tokenizer=ids_digest(self.template.encode(str(PROBE[0]["content"]))),
            template=ids_digest(self.template.prompt(PROBE).token_ids) if self.template.has_template else "",
        )

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together."""
        length = self._context_length or self.server.facts.context_length
        if length is None:
            self._notices.once(
                f"{self.wire.root} does not say how long its context is, so only the server refuses a prompt that "
                "is too long: pass context_length="
            )
        return length or 1 << 30

    def check_server(self, timeout: float = 0.0) -> None:
        """Wait until the server is ready, and check that it serves this model with these tokens.

        Args:
            timeout: seconds to wait while it starts.

        Raises:
            ServerUnavailableError: it is not ready in time.
            InvalidInputError: it does not serve the model, or its tokenizer is another one.
        """
        until = time.monotonic() + timeout
        while True:
            try:
                self.server.check(self.template if self._given_tokenizer is not None else None)
            except ServerUnavailableError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.5)
            else:
                return

    # --- ahead of the questions --------------------------------------------------------------------------------

    def build_vllm_kv_cache(
        self, prompt: str | Sequence[str] | Sequence[Message], *, namespace: str = ""
    ) -> ContextPrompt:
        """Have the server encode a context, to be continued by `generate`.

        Args:
            prompt: a str becomes the system turn; a list of str is joined into one by blank lines; chat messages are
                taken as they are, as closed turns.
            namespace: whose; see `stream`.

        Returns:
            The prompt that was sent, a str that knows its `token_ids`.

        Raises:
            EmptyPromptError: there is nothing to encode.
            ContextLengthError: it is longer than the model's context.
        """
        token_ids, messages = context_ids(self.template, prompt)
        self.preload(Prompt(token_ids, (), ()), namespace=namespace)
        return self.prompt_of(token_ids, messages)

    def preload(self, prompt: Prompt | ContextPrompt, *, namespace: str = "") -> Usage:
        """Have the server encode a prompt, so that what begins with it is answered sooner; one token is generated.

        It is remembered, and sent again when the server was restarted.

        Raises:
            EmptyPromptError: it has no tokens.
            ContextLengthError: it leaves no room for an answer.
        """
        if isinstance(prompt, ContextPrompt):
            self._check_model(prompt.fingerprint)
            prompt = Prompt(tuple(prompt.token_ids.tolist()), (), ())
        prompt = self.ordering.arrange(prompt)
        usage = self._send(prompt, namespace)
        self._preloads.add(prompt.token_ids, namespace)
        return usage

    def known_prefix(self, token_ids: Sequence[int], namespace: str = "") -> int:
        """How many tokens at the beginning of these this engine had the server encode."""
        return min(self._preloads.longest(token_ids, namespace), len(token_ids))

    def still_holds(self, token_ids: Sequence[int], namespace: str = "") -> bool:
        """Whether the server was sent these tokens by this engine."""
        return self.known_prefix(token_ids, namespace) == len(token_ids)

    def encode_item(self, head_ids: Sequence[int], token_ids: Sequence[int], *, namespace: str = "") -> VLLMKVCacheItem:
        """Have the server encode a document behind `head_ids`, where it is reused when it comes first."""
        whole = (*head_ids, *token_ids)
        self.preload(Prompt(whole, (), ()), namespace=namespace)
        return VLLMKVCacheItem(
            memory=str(self.prompt_of(whole)),
            token_ids=torch.tensor(token_ids, dtype=torch.long),
            fingerprint=self.fingerprint,
            base_position=len(head_ids),
            prefix_digest=ids_digest(head_ids),
        )

    def exact_context(self, context_ids: Sequence[int], tail_ids: Sequence[int], namespace: str = "") -> MergedContext:
        """Instruction and documents as the prompt that the server is sent, in order."""
        size, sent = len(context_ids), self.known_prefix(context_ids, namespace)
        return ServedContext(
            cache=DynamicCache(),
            token_ids=torch.tensor(context_ids, dtype=torch.long),
            tail_ids=torch.tensor(tail_ids, dtype=torch.long),
            report=MergeReport("prefix" if sent else "encoded", "exact", size, sent, 0, size - sent),
            fingerprint=self.fingerprint,
            prompt=str(self.prompt_of(context_ids)),
        )

    def forget(self, namespace: str = "") -> None:
        """Send nothing of a namespace's again. What the server holds stays there until other blocks need the room."""
        self._preloads.forget(namespace)

    def prompt_of(self, token_ids: Sequence[int], messages: list[dict[str, Any]] | None = None) -> ContextPrompt:
        """Tokens as the text of a prompt that knows them."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return ContextPrompt.of(str(text), token_ids, self.fingerprint, messages)

    # --- answering ---------------------------------------------------------------------------------------------

    def constrain(self, constraint: ConstraintLike, max_new_tokens: int, thinking: bool = False) -> ServerConstraint:
        """A constraint in the server's words.

        The server compiles it, so a malformed one raises when the answer is read; what the budget cuts is cut.

        Raises:
            ConstraintError: it is none, or the server cannot hold an answer to it.
        """
        return server_constraint(constraint, self.server.can(self._probe), thinking)

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
        """Answer a prompt of token ids. Closing the stream closes the request.

        Args:
            prompt: sent whole; what the server knows of its beginning, it reuses.
            sampling: the settings.
            past_key_values: a context that the prompt begins with, from `build_vllm_kv_cache` or `KVCacheMemory`.
            constraint: what the answer must be.
            namespace: whose. A hit is shared by those of the same namespace alone, on a server that knows `cache_salt`.
            started: from when times count.
            accept_merged: does nothing here: a server merges nothing.

        Raises:
            ContextLengthError: the prompt with `max_new_tokens` exceeds the context.
            ConstraintError: the constraint cannot be used.
            CacheMismatchError: the context is another model's, or the prompt does not begin with it.
            UnsupportedModelError: the context holds keys and values, which a server cannot be given.
            ServerUnavailableError, ServerTimeoutError, ServerError: the server is down, silent, or refuses.
        """
        started = started or time.perf_counter()
        if not prompt.token_ids:
            raise EmptyPromptError("the prompt has no tokens")
        if past_key_values is not None:
            self._check_context(past_key_values, prompt)
        prompt = self.ordering.arrange(prompt, count=True)
        budget = self.check_fits(len(prompt.token_ids), sampling.max_new_tokens)
        held = None if constraint is None else self.constrain(constraint, budget, prompt.thinking)
        return self._answer(Asked(prompt, sampling, budget, started), namespace, held)

    def _answer(self, asked: Asked, namespace: str, held: ServerConstraint | None) -> Generator[Chunk, None, None]:
        self._check_tokens()
        salt = salt_of(self._salt_secret, namespace) if self.server.knows_salt(namespace) else None
        fields = held.fields if held else {}
        body = asked.request(self.model_name, is_vllm=self.server.facts.is_vllm, salt=salt, fields=fields)
        token_ids = asked.prompt.token_ids

        def told(cached_tokens: int | None) -> None:
            self.server.notice_hits(token_ids, namespace, cached_tokens)
            self._preloads.answered(token_ids, namespace, cached_tokens)

        try:
            yield from asked.chunks(self.wire.events("/v1/completions", body), told)
        except ServerError as refused:
            raise self.server.explained(refused, held) from refused

    # --- inside ------------------------------------------------------------------------------------------------

    def _send(self, prompt: Prompt, namespace: str) -> Usage:
        with closing(self.stream(prompt, Sampling(max_new_tokens=1), namespace=namespace)) as chunks:
            *_, last = chunks
        assert last.usage is not None
        return last.usage

    def _resend(self, token_ids: Sequence[int], namespace: str) -> None:
        self._send(Prompt(tuple(token_ids), (), ()), namespace)

    def _probe(self, fields: Mapping[str, Any]) -> str:
        prompt = self.template.prompt([{"role": "user", "content": "Hello."}])
        chunks = self._answer(Asked(prompt, Sampling(), 24, time.perf_counter()), "", ServerConstraint(fields))
        return "".join(chunk.text for chunk in chunks)

    def _check_context(self, context: Cache | MergedContext | ContextPrompt, prompt: Prompt) -> None:
        if not isinstance(context, ServedContext | ContextPrompt):
            raise UnsupportedModelError(
                f"a server cannot be given a {type(context).__name__}: it keeps its keys and values itself. Pass what "
                "build_vllm_kv_cache gave, a context of a KVCacheMemory over this engine, or the whole prompt."
            )
        self._check_model(context.fingerprint)
        held = tuple(context.token_ids.tolist())
        if prompt.token_ids[: len(held)] != held:
            raise TokenMismatchError("the prompt does not begin with the context: begin it with context.token_ids")

    def _check_model(self, made_by: ModelFingerprint) -> None:
        if not self.fingerprint.matches(made_by):
            raise FingerprintMismatchError("the context", self.fingerprint.differences(made_by))

    def _check_tokens(self) -> None:
        if self._given_tokenizer is not None:
            self.server.check_tokens(self.template)
