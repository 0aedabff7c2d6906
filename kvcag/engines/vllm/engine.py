"""The engine over a vLLM server, or over any other server with OpenAI's completions API."""

from __future__ import annotations

import base64
import hashlib
import hmac
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from typing_extensions import Self

from kvcag.chat_template import ChatTemplate, Message, Prompt, as_messages
from kvcag.core import (
    Answer,
    Chunk,
    ContextPrompt,
    FinishReason,
    MergedContext,
    MergeReport,
    ServedContext,
    Usage,
    VLLMKVCacheItem,
    ids_digest,
)
from kvcag.engines.base import Engine, Sampling, context_ids
from kvcag.engines.constrain import ConstraintLike, ServerConstraint
from kvcag.engines.decode import Account, KnownPrefix, StopStrings, ThinkingFilter
from kvcag.engines.vllm.client import Card, Cards, Choice, Counts, HTTPClient
from kvcag.engines.vllm.constraints import ConstraintSupport, constraint_support, server_constraint
from kvcag.engines.vllm.documents import ServedDocuments
from kvcag.engines.vllm.preloads import Preloads
from kvcag.engines.vllm.tokenizer import PROBE, ServerTokenizer, check_tokens
from kvcag.errors import (
    ConstraintError,
    EmptyPromptError,
    EngineError,
    FingerprintMismatchError,
    InvalidInputError,
    ServerError,
    ServerUnavailableError,
    TokenMismatchError,
    UnsupportedModelError,
    WarnOnce,
)
from kvcag.fingerprint import ModelFingerprint

if TYPE_CHECKING:
    import httpx

DocumentOrder: TypeAlias = Literal["given", "canonical", "frequent"]

_OPENAI_STOPS = 4
"""The most stop strings that OpenAI's API accepts. The engine itself looks for all of them."""
_SHOULD_HIT = 256
"""If a prompt shares this many tokens with the previous one, a server that reports cached tokens must report some."""


class VLLMEngine(Engine):
    """Answers from a vLLM server, whose prefix cache keeps the keys and values.

    Prompts are sent as token ids: instruction first, documents in order, question last. The server reuses the longest
    cached prefix. It merges documents only with kvcag's connector (`merge_documents`). Making an engine needs no
    server; the first use does. Safe to use from several threads. Close it, or use it in a `with` block.

    ```python
    engine = VLLMEngine("http://127.0.0.1:8000/v1", tokenizer="Qwen/Qwen3-8B")
    llm = ChatKVCAG(engine=engine)
    ```

    Any server with OpenAI's `/v1/completions` works. A `ServerWarning` says once which feature the server lacks.

    Args:
        base_url: the URL of the API, with or without `/v1`.
        model: the model's name on the server; by default the only model of the server.
        tokenizer: a hub id, a folder or a tokenizer. It must be the server's, and is compared with it once. None uses
            vLLM's `/tokenize`, with one request per text that was not used recently.
        api_key: sent as a bearer token.
        context_length: the most tokens of prompt and answer together; by default the server's own limit.
        document_order: `"given"` keeps the order. `"canonical"` sorts documents by their content, so that the same
            documents in any order make the same prompt. `"frequent"` puts the most frequent documents first, so that
            more prompts share a prefix. Use the last two only for documents whose order does not matter and that end
            with a separator, as the documents of the adapters do.
        merge_documents: use the server's `KVCAGConnector` to merge documents in any order. The engine detects the
            connector. With False, documents are read in order.
        salt_secret: a secret of this application. The cache salts of namespaces are made from it, so that other
            clients of the server cannot make them and share no cached prompts with this application.
        template_variables: passed to the chat template, for example `{"enable_thinking": False}`.
        defaults: settings for calls that do not give them, for example `{"temperature": 0.7}`.
        timeout: seconds to wait for the first token, and between two tokens.
        deadline: the most seconds for a whole answer, including all repetitions of its request.
        connect_timeout: seconds to wait for a connection.
        max_retries: how often to repeat a request that failed before its answer began.
        retry_wait: seconds before the first repetition. Each pause is twice as long as the one before.
        client: your own `httpx.Client`, for certificates, proxies or headers. Its timeouts apply. Closing the engine
            does not close this client.

    Raises:
        MissingExtraError: the extra `vllm` is not installed.
        InvalidInputError: `base_url` is not a URL, `document_order` is unknown, or `defaults` has an unknown name or a
            value out of range.
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
        merge_documents: bool = True,
        salt_secret: str = "",
        template_variables: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        deadline: float = 3600.0,
        connect_timeout: float = 5.0,
        max_retries: int = 3,
        retry_wait: float = 0.5,
        client: httpx.Client | None = None,
    ) -> None:
        Sampling.of(**(defaults or {}))
        self.defaults = dict(defaults or {})
        self._order = DocumentSorter(document_order)
        self.seams = "none" if document_order == "given" else "endings"
        self._http = HTTPClient(
            base_url,
            api_key=api_key,
            timeout=timeout,
            deadline=deadline,
            connect_timeout=connect_timeout,
            max_retries=max_retries,
            retry_wait=retry_wait,
            client=client,
        )
        self._model, self._context_length = model, context_length
        self._given_tokenizer, self._template_variables = tokenizer, template_variables
        self._salt_secret = salt_secret
        self._merges = merge_documents
        self._documents = ServedDocuments(self._http, self._body_of_one, lambda name: cache_salt(salt_secret, name))
        self._unlearned: set[str] = set()  # namespaces whose documents the server cannot merge
        self._warnings = WarnOnce()
        self._server_lock = threading.RLock()  # guards the facts about the server, which change with its restart
        self._known_card: Card | None = None
        self._support: ConstraintSupport | None = None
        self._tokens_checked = False
        self._last_beginning: tuple[str, tuple[int, ...]] | None = None
        self._preloads = Preloads(self._http, self._send, self._forget_server, self._warnings)

    def close(self) -> None:
        """Close the connections. Waits at most five seconds for the thread that sends contexts again."""
        self._preloads.close()
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the model ---------------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """The model's name on the server."""
        return self._model or self._card.id

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the prompts: the one that was passed, or the server's."""
        given = self._given_tokenizer
        if given is None:
            return cast("PreTrainedTokenizerBase", ServerTokenizer(self._http, self.model_name))
        if isinstance(given, str | PathLike):
            return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(fspath(given)))
        return given

    @cached_property
    def template(self) -> ChatTemplate:  # type: ignore[override]
        """Makes prompts of messages."""
        return ChatTemplate(self.tokenizer, self._template_variables)

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """The fingerprint: the model's name, and digests of its token ids for a text and for a chat.

        A server does not show its weights.
        """
        return ModelFingerprint(
            model_name=self.model_name,
            architecture=type(self).__name__,
            dtype="the server's",
            geometry="",
            weights=hashlib.sha256(self.model_name.encode()).hexdigest(),
            tokenizer=ids_digest(self.template.encode(str(PROBE[0]["content"]))),
            template=ids_digest(self.template.prompt(PROBE).token_ids) if self.template.has_template else "",
        )

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together."""
        length = self._context_length or self._card.max_model_len
        if length is None:
            self._warnings.once(
                f"{self._http.root} does not report its context length, so a prompt that is too long is not refused "
                "before it is sent. Pass context_length=."
            )
        return length or 1 << 30

    def check_server(self, timeout: float = 0.0) -> None:
        """Wait until the server is ready, and check that it serves this model with this tokenizer.

        Args:
            timeout: seconds to wait while the server starts.

        Raises:
            ServerUnavailableError: the server is not ready after `timeout` seconds.
            InvalidInputError: the server does not serve the model, or has another tokenizer.
        """
        until = time.monotonic() + timeout
        while True:
            try:
                with self._server_lock:
                    self._forget_server()
                    self._known_card = self._read_card()
                    self._check_tokens()
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
        """Let the server encode a context that `generate` continues.

        Args:
            prompt: a str, or a list of str, which is joined by blank lines, becomes the system turn; chat messages
                become complete turns.
            namespace: see `stream`.

        Returns:
            The prompt that was sent, a str with the attribute `token_ids`.

        Raises:
            EmptyPromptError: the prompt is empty.
            ContextLengthError: the context leaves no room for an answer.
            EngineError: the server failed.
        """
        token_ids, messages = context_ids(self.template, prompt)
        self.preload(Prompt(token_ids, (), ()), namespace=namespace)
        return self.prompt_of(token_ids, messages)

    def preload(self, prompt: Prompt | ContextPrompt, *, namespace: str = "") -> Usage:
        """Let the server encode a prompt and generate one token, so that prompts with this prefix are answered faster.

        The prompt is sent again after the server restarted.

        Args:
            prompt: the prompt, or a context from `build_vllm_kv_cache`.
            namespace: see `stream`.

        Returns:
            The usage of the request.

        Raises:
            EmptyPromptError: the prompt has no tokens.
            ContextLengthError: the prompt leaves no room for an answer.
            FingerprintMismatchError: the context was made with another model.
            EngineError: the server failed.
        """
        if isinstance(prompt, ContextPrompt):
            self._check_model(prompt.fingerprint)
            prompt = Prompt(tuple(prompt.token_ids.tolist()), (), ())
        token_ids = self._order.arrange(prompt).token_ids
        usage = self._send(token_ids, namespace)
        self._preloads.add(token_ids, namespace)
        return usage

    def known_prefix(self, token_ids: Sequence[int], namespace: str = "") -> int:
        """Return the length of the longest prefix that this engine preloaded."""
        return min(self._preloads.longest(token_ids, namespace), len(token_ids))

    def still_holds(self, token_ids: Sequence[int], namespace: str = "") -> bool:
        """Whether this engine sent these tokens to the server to encode them."""
        if self._documents.holds(token_ids, namespace):
            return True
        return self.known_prefix(token_ids, namespace) == len(token_ids)

    def encode_item(self, head_ids: Sequence[int], token_ids: Sequence[int], *, namespace: str = "") -> VLLMKVCacheItem:
        """Let the server encode a document after `head_ids`. See `Engine.encode_item`.

        With the connector, the server can reuse the document at any place; else only as the first document.
        """
        whole = (*head_ids, *token_ids)
        if self._merges and self._documents.is_available:
            self.check_fits(len(whole), 1)
            self._documents.keep(head_ids, token_ids, namespace)
        else:
            self.preload(Prompt(whole, (), ()), namespace=namespace)
        return VLLMKVCacheItem(
            memory=str(self.prompt_of(whole)),
            token_ids=torch.tensor(token_ids, dtype=torch.long),
            fingerprint=self.fingerprint,
            base_position=len(head_ids),
            prefix_digest=ids_digest(head_ids),
        )

    def exact_context(self, context_ids: Sequence[int], tail_ids: Sequence[int], namespace: str = "") -> MergedContext:
        """Return instruction and documents, in order, as a prompt for the server. See `Engine.exact_context`."""
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
        """Do not preload a namespace's prompts again, and let the connector delete the namespace from its store.

        The server's own prefix cache drops the blocks when it needs the memory.
        """
        self._preloads.forget(namespace)
        self._documents.erase(namespace)

    def serves_merged(self, strategy: str, namespace: str = "") -> bool:
        """Whether the server merges documents by this strategy: it has the connector. False if the server is down.

        Raises:
            UnsupportedModelError: the server has the connector, but the strategy recomputes tokens.
        """
        try:
            if strategy == "exact" or not self._merges or not self._documents.is_available:
                return False
        except EngineError:  # the request for the answer reports the error
            return False
        if strategy not in ("auto", "rotate"):
            raise UnsupportedModelError(
                f"the server cannot merge by {strategy!r}, because a server cannot recompute single tokens in the "
                "middle of a prompt. Use 'rotate', 'exact' or 'auto', or an HFEngine."
            )
        return namespace not in self._unlearned

    def learn_drift(self, head_ids: Sequence[int], passages: Sequence[Sequence[int]], namespace: str = "") -> None:
        """Let the connector learn the usual drift of documents, unless it already has. See `Engine.learn_drift`."""
        if self._documents.has_learned(namespace) or self._documents.learn(head_ids, passages, namespace):
            return
        self._unlearned.add(namespace)
        self._warnings.once(f"{self._http.root} cannot merge documents, so it reads them in order. Its log says why.")

    def prompt_of(self, token_ids: Sequence[int], messages: list[dict[str, Any]] | None = None) -> ContextPrompt:
        """Return tokens as a `ContextPrompt`. See `Engine.prompt_of`."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return ContextPrompt.of(str(text), token_ids, self.fingerprint, messages)

    # --- answering ---------------------------------------------------------------------------------------------

    def constrain(self, constraint: ConstraintLike, max_new_tokens: int, thinking: bool = False) -> ServerConstraint:
        """Convert a constraint to fields of a request. The first call asks the server what it can enforce.

        The server compiles the constraint, so a malformed one raises an error when the answer is read. An answer that
        reaches `max_new_tokens` is cut.

        Raises:
            ConstraintError: the value is not a constraint, or the server cannot enforce it.
        """
        with self._server_lock:
            if self._support is None:
                self._support = constraint_support(self._complete)
            return server_constraint(constraint, self._support, thinking)

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
        """Answer a prompt; see `Engine.stream`. Closing the stream closes the request.

        Args:
            prompt: sent as a whole; the server reuses the longest prefix that it has cached.
            sampling: the settings.
            past_key_values: a context that the prompt begins with, from `build_vllm_kv_cache` or `KVCacheMemory`.
            constraint: the form of the answer.
            namespace: becomes the server's `cache_salt`: only prompts of the same namespace share cached tokens.
            started: the time from which `Usage` counts (`time.perf_counter()`).
            accept_merged: the server's connector may merge the documents.

        Raises:
            UnsupportedModelError: the context has keys and values, which a server cannot receive.
            ServerUnavailableError, ServerTimeoutError, ServerError: the server is down, does not respond, or refuses.
        """
        started = started or time.perf_counter()
        if not prompt.token_ids:
            raise EmptyPromptError("the prompt has no tokens: there is nothing to answer")
        if past_key_values is not None:
            self._check_context(past_key_values, prompt)
        prompt = self._order.arrange(prompt, count=True)
        budget = self.check_fits(len(prompt.token_ids), sampling.max_new_tokens)
        fields = {} if constraint is None else self.constrain(constraint, budget, prompt.thinking).fields
        merged = accept_merged and bool(prompt.document_ids)
        return self._answer(prompt, replace(sampling, max_new_tokens=budget), namespace, fields, started, merged)

    def _answer(
        self,
        prompt: Prompt,
        sampling: Sampling,
        namespace: str,
        fields: Mapping[str, Any],
        started: float,
        merged: bool = False,
    ) -> Generator[Chunk, None, None]:
        """Yield the answer as text, one chunk per event. The last chunk has the finish reason and the usage."""
        self._check_tokens()
        body, encoded = self._body(prompt, sampling, namespace, fields), 0
        if merged:
            served, encoded = self._documents.merging(prompt, namespace)
            body |= {"cache_salt": served.salt, "kv_transfer_params": served.params}
        thinking = ThinkingFilter(prompt.thinking, strips=sampling.strip_thinking)
        stop = StopStrings(sampling.stop)
        finish: FinishReason = "length"  # the reason if the server sends more tokens than `max_tokens`
        counted = Counts()
        first_at, pieces = 0.0, 0
        try:
            with closing(self._http.events("/v1/completions", body)) as events:
                for event in events:
                    counted = event.usage or counted
                    for choice in event.choices or ():
                        first_at, pieces = first_at or time.perf_counter(), pieces + 1
                        piece = choice.text or ""
                        yield Chunk(stop.push(thinking.push(piece)), thinking=thinking.take())
                        finish = _finish_reason(choice) or finish
                    if stop.found:
                        break
        except ServerError as refused:
            if fields and refused.status in (400, 422):
                raise ConstraintError(
                    f"the server refused the constraint: {refused.detail} (sent: {dict(fields)!r:.200})"
                ) from refused
            raise
        cached = counted.prompt_tokens_details.cached_tokens if counted.prompt_tokens_details else None
        rest = ""
        if not stop.found:
            self._check_hits(prompt.token_ids, namespace, cached)
            rest = stop.push(thinking.flush())
            rest += "" if stop.found else stop.flush()
        size, now = len(prompt.token_ids), time.perf_counter()
        reused = min(cached or 0, size - 1)
        kept, report = 0 if cached is None else size - reused, None
        if merged and cached is not None:
            context = len(prompt.context_ids)
            report = _merge_report(context, min(reused, context), encoded)
            kept = size - max(reused, context)
            if context - reused > _SHOULD_HIT:
                self._documents.missed(prompt, namespace)
        found = max(reused, len(prompt.context_ids)) if report else reused
        account = Account.of(prompt, report, KnownPrefix(found), kept, started)
        usage = Usage(
            prompt_tokens=size,
            cached_tokens=account.cached_tokens,
            created_tokens=account.created_tokens,
            completion_tokens=counted.completion_tokens or pieces,
            ttft_s=(first_at or now) - started,
            total_s=now - started,
            context=account.context,
        )
        yield Chunk(rest, (), "stop" if stop.found else finish, usage, thinking.take())

    def _body(self, prompt: Prompt, sampling: Sampling, namespace: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body of a `/v1/completions` request.

        A vLLM server gets every setting, since it would else use the model's own defaults, which `HFEngine` does not
        use. Other servers get only the given settings, since some refuse unknown fields.
        """
        is_vllm = self._card.owned_by == "vllm"
        settings = ("top_p", "top_k", "min_p", "repetition_penalty", "seed")
        given = {name: value for name in settings if (value := getattr(sampling, name)) is not None}
        neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0} if is_vllm else {}
        body: dict[str, Any] = {
            "model": self.model_name,
            "prompt": list(prompt.token_ids),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
            **neutral,
            **given,
        }
        if sampling.stop and not sampling.strip_thinking:  # the server would also stop inside the thinking
            body["stop"] = list(sampling.stop if is_vllm else sampling.stop[:_OPENAI_STOPS])
        salt = cache_salt(self._salt_secret, namespace)
        if salt is not None and is_vllm:
            body["cache_salt"] = salt
        elif namespace and not is_vllm:
            self._warnings.once(
                f"{self._http.root} is not a vLLM server and has no cache salts: namespaces share cached prompts, and "
                "the time of an answer reveals whether another namespace sent the same prompt. Use one server per "
                "namespace, or switch its prefix cache off."
            )
        return body

    def _body_of_one(self, token_ids: Sequence[int], namespace: str) -> dict[str, Any]:
        """Return the body of a request for one token, which is not streamed."""
        body = self._body(Prompt(tuple(token_ids), (), ()), Sampling(max_new_tokens=1), namespace, {})
        return {name: value for name, value in body.items() if name not in ("stream", "stream_options")}

    def _send(self, token_ids: Sequence[int], namespace: str) -> Usage:
        prompt = Prompt(tuple(token_ids), (), ())
        return Answer.of(self.stream(prompt, Sampling(max_new_tokens=1), namespace=namespace)).usage

    def _complete(self, fields: Mapping[str, Any]) -> str:
        prompt, sampling = self.template.prompt(as_messages("Hello.")), Sampling(max_new_tokens=24)
        return Answer.of(self._answer(prompt, sampling, "", fields, time.perf_counter())).text

    # --- facts about the server --------------------------------------------------------------------------------

    @property
    def _card(self) -> Card:
        """The model's entry in the server's `/v1/models`."""
        with self._server_lock:
            if self._known_card is None:
                self._known_card = self._read_card()
            return self._known_card

    def _read_card(self) -> Card:
        listed = self._http.json(Cards, "/v1/models")
        cards = {card.id: card for card in (listed and listed.data) or ()}
        if not cards:
            self._warnings.once(f"{self._http.root} does not list its models. Pass model= and context_length=.")
        elif (self._model not in cards) if self._model else len(cards) > 1:
            raise InvalidInputError(f"{self._http.root} serves {', '.join(cards)}. Pass one of them as model=.")
        return cards.get(self._model) or next(iter(cards.values()), Card(id=self._model))

    def _forget_server(self) -> None:
        """Drop the facts about the server, to read them again at the next use: another server may run there now."""
        with self._server_lock:
            self._known_card, self._support, self._tokens_checked = None, None, False
            self._unlearned.clear()
        self._documents.forget()

    def _check_tokens(self) -> None:
        with self._server_lock:
            if self._given_tokenizer is None or self._tokens_checked:
                return
            if not check_tokens(self._http, self.model_name, self.template):
                self._warnings.once(
                    f"{self._http.root} has no /tokenize, so the tokenizer could not be compared with the server's. "
                    "Make sure that it is the same: another tokenizer's token ids would be another text to the server."
                )
            self._tokens_checked = True

    def _check_hits(self, token_ids: tuple[int, ...], namespace: str, cached: int | None) -> None:
        """Look for signs of a restart, and warn if the server does not report cached tokens that it must have."""
        self._preloads.check(token_ids, namespace, cached)
        beginning = (namespace, token_ids[:_SHOULD_HIT])
        if cached is None and len(token_ids) > _SHOULD_HIT and beginning == self._last_beginning:
            self._warnings.once(
                f"{self._http.root} does not report cached tokens, so usage shows none. Start vLLM with "
                "--enable-prompt-tokens-details."
            )
        self._last_beginning = beginning

    def _check_context(self, context: Cache | MergedContext | ContextPrompt, prompt: Prompt) -> None:
        if not isinstance(context, ServedContext | ContextPrompt):
            raise UnsupportedModelError(
                f"a server cannot receive a {type(context).__name__}, because it has its own keys and values. Pass a "
                "context from build_vllm_kv_cache or from a KVCacheMemory over this engine, or the whole prompt."
            )
        self._check_model(context.fingerprint)
        held = tuple(context.token_ids.tolist())
        if prompt.token_ids[: len(held)] != held:
            raise TokenMismatchError("the prompt does not begin with the context. Begin it with context.token_ids.")

    def _check_model(self, made_by: ModelFingerprint) -> None:
        if not self.fingerprint.matches(made_by):
            raise FingerprintMismatchError("the context", self.fingerprint.differences(made_by))


def _merge_report(context: int, found: int, encoded: int) -> MergeReport:
    """Return the report for `context` tokens, of which the server reused `found` after encoding `encoded` documents."""
    paid = min(context, context - found + encoded)
    return MergeReport(
        "merged" if found else "encoded", "rotate" if found else "exact", context, context - paid, 0, paid
    )


def cache_salt(secret: str, namespace: str) -> str | None:
    """Return the salt of a namespace, HMAC-SHA256 of its name under the secret; None without secret and namespace.

    vLLM hashes the salt with every block, so namespaces share no cached tokens, and the time of an answer reveals
    nothing about other namespaces.
    """
    if not secret and not namespace:
        return None
    digest = hmac.new(secret.encode(), namespace.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _finish_reason(choice: Choice) -> FinishReason | None:
    reason = choice.finish_reason
    if reason in ("abort", "error"):
        raise EngineError(f"the server ended the answer ({reason}). It may be stopping or out of memory. Ask again.")
    return None if reason is None else "length" if reason == "length" else "stop"


class DocumentSorter:
    """Sorts the documents of prompts, so that more prompts share a prefix. Safe to use from several threads.

    Args:
        order: see `VLLMEngine`. `"frequent"` rounds counts to powers of two, so that the order seldom changes.

    Raises:
        InvalidInputError: the order is unknown.
    """

    MOST = 1 << 16
    """The most documents that are counted; the least recently used are dropped first."""

    def __init__(self, order: DocumentOrder) -> None:
        if order not in ("given", "canonical", "frequent"):
            raise InvalidInputError(f"document_order must be 'given', 'canonical' or 'frequent', not {order!r}")
        self.order = order
        self._counts: OrderedDict[str, int] = OrderedDict()  # by a digest of the tokens, least recently used first
        self._lock = threading.Lock()

    def arrange(self, prompt: Prompt, *, count: bool = False) -> Prompt:
        """Return the prompt with sorted documents. With `count`, count its documents, as for a question.

        Documents with other text between them are not sorted.
        """
        if self.order == "given" or not prompt.document_ids or any(prompt.between_ids):
            return prompt
        texts = prompt.documents or ("",) * len(prompt.document_ids)
        keyed = [(ids_digest(ids), ids, text) for ids, text in zip(prompt.document_ids, texts, strict=True)]
        with self._lock:
            keyed.sort(key=lambda entry: (-self._counts.get(entry[0], 0).bit_length(), entry[0]))
            if count and self.order == "frequent":
                for digest, _, _ in keyed:
                    self._counts[digest] = self._counts.pop(digest, 0) + 1
                while len(self._counts) > self.MOST:
                    self._counts.popitem(last=False)
        _, ids, documents = zip(*keyed, strict=True)
        return replace(prompt, document_ids=ids, documents=documents if prompt.documents else ())
