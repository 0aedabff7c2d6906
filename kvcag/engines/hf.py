"""`HFEngine`, the engine over a Hugging Face causal language model in this process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakSet

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvcag.cache.attention import (
    OVER_SDPA,
    attends_to_its_own,
    by_position,
    by_row,
    check_mergeable,
    put_back_attention,
)
from kvcag.cache.layers import (
    BETWEEN_LAYERS,
    ContextCache,
    GenerationCache,
    LayerKV,
    Layers,
    behind,
    cache_argument,
    cache_of,
    check_cacheable,
    contiguous_copy,
    crop,
    cut,
    decoder_of,
    device_of,
    generation_cache,
    kinds_of,
    latent_shape,
    layers_of,
    nbytes,
    run,
)
from kvcag.cache.merge import MergeHistory, Passes
from kvcag.cache.prefix_cache import InFlight, PrefixCache
from kvcag.cache.states import Maps, ignores_states, recording
from kvcag.chat_template import ChatTemplate, Message, Prompt
from kvcag.concurrency import IdleWork, ModelLock, cancellation
from kvcag.core import Chunk, ContextPrompt, KVCacheItem, MergedContext, MergeReport, Mode, ReadTail, ids_digest
from kvcag.engines.base import Engine, Sampling, context_ids
from kvcag.engines.constrain import Constraint, ConstraintCompiler, ConstraintLike
from kvcag.engines.cpu import Step, put_back_onednn
from kvcag.engines.decode import (
    Account,
    Alone,
    Decoding,
    Detokenizer,
    Pending,
    Prediction,
    Sampler,
    Steps,
    StopStrings,
    ThinkingFilter,
    reusable_prefix,
)
from kvcag.engines.loading import Int8Linear, load
from kvcag.errors import CacheWarning, DeviceMemoryError, EmptyPromptError, UnsupportedModelError, WarnOnce
from kvcag.fingerprint import ModelFingerprint, WeightsWatch

if TYPE_CHECKING:
    from kvcag.engines.cuda.graphs import Graphs

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_CHUNK, _SHORTEST_CHUNK, _LONGEST_CHUNK = 512, 64, 2048
"""The number of tokens of one prefill pass. On a CPU it is adapted to the last pass's time per layer."""

_LAYER_SECONDS, _BACKGROUND_LAYER_SECONDS = 0.1, 0.02
"""How long one layer of a pass may take, since other answers, and a cancellation, wait for the end of the layer."""

_PREFIX_CACHE_BYTES = 2 << 30

_MOST_TOGETHER = 64
"""The most generations whose steps are taken as a batch."""


@dataclass(slots=True)
class _Begun:
    """An answer that is being prepared (`HFEngine.begun`).

    Attributes:
        engine: the answer's engine.
        namespace: the answer's namespace.
        epoch: the namespace's epoch at the beginning (`PrefixCache.epoch`).
        fingerprint: the model's fingerprint, after the first access.
    """

    engine: HFEngine
    namespace: str
    epoch: int
    fingerprint: ModelFingerprint | None = None


_BEGUN: ContextVar[_Begun | None] = ContextVar("kvcag_begun", default=None)
_IN_BACKGROUND: ContextVar[bool] = ContextVar("kvcag_in_background", default=False)


class HFEngine(Engine):
    """Encodes text into KV caches, and answers from them.

    Each generation has its own cache, in the model's dtype, which is released at its end; tensors that generations
    share are only read. Safe to use from several threads: they take turns at the model, and concurrent answers take
    their decode steps as a batch.

    Args:
        model: a decoder-only model with attention, recurrent layers or both, also with adapters (peft). It is put into
            evaluation mode.
        tokenizer: the model's tokenizer.
        prefix_cache_bytes: the budget for recent contexts, of which a prompt reuses the longest known prefix; 2 GiB by
            default. 0 disables the reuse.
        cuda_graphs: on an NVIDIA GPU, run passes of up to 256 tokens over a cache as CUDA graphs
            (`kvcag.engines.cuda`), 5 to 10 times faster. The first such pass compares a graph's logits with the
            model's own. A model whose logits differ, or that cannot be captured, runs without graphs, and the engine's
            repr says why. Do not replace the model's weights in place: a graph reads them at their old addresses.
        template_variables: passed to the chat template; see `ChatTemplate`.
        control_tokens: documents and messages may contain control tokens; see `ChatTemplate`.
        defaults: settings of `Sampling` for calls that do not give them.

    Raises:
        UnsupportedModelError: the model is an encoder-decoder, has a cache of another kind than transformers' own cache
            layers, or has an adapter that puts tokens before the prompt.
        InvalidInputError: `defaults` has an unknown name, or a value out of range.
    """

    merges = True
    has_logprobs = True
    item_type = KVCacheItem
    _without_graphs = ""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prefix_cache_bytes: int = _PREFIX_CACHE_BYTES,
        cuda_graphs: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        control_tokens: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
            raise UnsupportedModelError(
                "an adapter that puts its own tokens before the prompt (prompt or prefix tuning) changes the cache. "
                "Use an adapter of the weights, such as LoRA."
            )
        model = getattr(model, "get_base_model", lambda: model)()  # unwraps PEFT's wrapper; adapters stay
        check_cacheable(model)
        Sampling.of(**(defaults or {}))
        self.defaults = dict(defaults or {})
        self.model = model.eval()
        if getattr(model, "is_loaded_in_4bit", False):  # on a CPU, bitsandbytes changes the weights in the first pass
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.long, device=device_of(model)))
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, template_variables, control_tokens=control_tokens)
        self._kinds = kinds_of(model)
        self._weights: WeightsWatch | None = None
        self._fingerprint: ModelFingerprint | None = None
        self._begin(prefix_cache_bytes)
        _ENGINES.add(self)
        self._chunk_tokens, self._longest_chunk = _FIRST_CHUNK, _LONGEST_CHUNK
        self._state_distance = 0  # see `_fill`; 0 until the size of the states is known
        self._cuda_graphs = cuda_graphs

    def _begin(self, prefix_cache_bytes: int) -> None:
        """Make empty caches of recent contexts, and new locks. A forked process calls this again."""
        self.prefixes = PrefixCache(prefix_cache_bytes, self.template.control_ids, recurrent=bool(self._kinds))
        self.lock = ModelLock()
        self.merge_history = MergeHistory()
        self._in_flight = InFlight()
        self._idle = IdleWork()
        self._notices = WarnOnce()
        self._fingerprint_lock = threading.Lock()
        self.learning = threading.RLock()  # while a drift is learned or read
        self._steps = Steps(self.exclusive, self.predict, self._together, _MOST_TOGETHER)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | PathLike[str],
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        *,
        int8_weights: bool = False,
        prefix_cache_bytes: int = _PREFIX_CACHE_BYTES,
        cuda_graphs: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        control_tokens: bool = False,
        defaults: Mapping[str, Any] | None = None,
        **from_pretrained_kwargs: Any,
    ) -> HFEngine:
        """Load a model and its tokenizer from a hub id or a folder.

        Args:
            model_name_or_path: a hub id or a folder.
            dtype: `"auto"` is the checkpoint's own. On a CPU, `"auto"` loads 16-bit weights as bfloat16 if the CPU
                multiplies fast in bfloat16, which is measured in 20 ms, and else as float32.
            device: `"auto"` is CUDA, else MPS, else the CPU. Ignored with a `device_map`.
            int8_weights: on a CPU, use int8 weights in linear layers, with one scale per output, so that a step reads
                half as many bytes as in bfloat16. The model has another fingerprint, and so needs its own caches.
            prefix_cache_bytes: see the class.
            cuda_graphs: see the class.
            template_variables: see the class.
            control_tokens: see the class.
            defaults: see the class.
            **from_pretrained_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            InvalidInputError: `int8_weights` with another device than a CPU.
            UnsupportedModelError: see the class; or `int8_weights` with a model that has no suitable layer.
        """
        model, tokenizer = load(
            str(model_name_or_path), dtype, device, from_pretrained_kwargs, int8_weights=int8_weights
        )
        return cls(
            model,
            tokenizer,
            prefix_cache_bytes=prefix_cache_bytes,
            cuda_graphs=cuda_graphs,
            template_variables=template_variables,
            control_tokens=control_tokens,
            defaults=defaults,
        )

    # --- the model ---------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> ModelFingerprint:
        """The fingerprint of the model, which every cache carries.

        It is computed again after weights were replaced or edited in place, or adapters loaded, switched, merged or
        unloaded; recent contexts of the earlier model are dropped then. Within `begun`, the model is checked once.
        """
        begun = _BEGUN.get()
        if begun is not None and begun.engine is self and begun.fingerprint is not None:
            return begun.fingerprint
        with self._fingerprint_lock:
            found = taken = self._fingerprint
            if found is None or self._weights is None or self._weights.sees_change():
                self._weights = WeightsWatch(self.model)
                found = self._fingerprint = ModelFingerprint.of(self.model, self.tokenizer)
        if begun is not None and begun.engine is self:
            begun.fingerprint = found
        if taken is not None and not found.matches(taken):
            self.forget(None)
            self.__dict__.pop("_graphs", None)  # they read the weights at their old addresses
        return found

    @property
    def model_name(self) -> str:
        """The hub id or the folder of the model."""
        return self.fingerprint.model_name

    def __repr__(self) -> str:
        how = ""
        if self.device.type == "cuda":
            how = f", cuda_graphs={self._without_graphs or self._cuda_graphs!r}"
        elif any(isinstance(module, Int8Linear) for module in self.model.modules()):
            how = ", int8 weights"
        return f"<{type(self).__name__} {self.model_name}, {self.model.dtype}, {self.device}{how}>"

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return device_of(self.model)

    @cached_property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together."""
        config = self.model.config.get_text_config(decoder=True)
        return int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end an answer, from the generation configuration, the model's and the tokenizer."""
        ids: set[int] = set()
        for source in (self.model.generation_config, self.model.config, self.tokenizer):
            eos = getattr(source, "eos_token_id", None)
            ids.update(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])
        return frozenset(ids)

    @property
    def answers_at_once(self) -> int:  # type: ignore[override]
        """How many answers to a list of questions run at the same time. On a CPU, each copies its context."""
        return 32 if self.device.type == "cuda" else 8

    @cached_property
    def bytes_per_token(self) -> int:
        """The bytes of one token's keys and values, over all layers."""
        layers, kv_heads, head_dim = map(int, self.fingerprint.geometry.split("x"))
        config = self.model.config.get_text_config(decoder=True)
        if self._kinds:
            layers = sum(attends for attends, _ in self._kinds)
        layers -= getattr(config, "num_kv_shared_layers", None) or 0
        kv_heads, key_dim, value_dim = latent_shape(config) or (kv_heads, head_dim, head_dim)
        return int(layers * kv_heads * (key_dim + value_dim) * torch.empty(0, dtype=self.model.dtype).element_size())

    @property
    def is_recurrent(self) -> bool:
        """Whether the model has recurrent layers, which can continue a cache only from its end."""
        return bool(self._kinds)

    def check_mergeable(self) -> None:
        """Refuse a model whose caches cannot be merged. The first call runs a few short passes.

        Raises:
            UnsupportedModelError: see `kvcag.cache.attention.check_mergeable`.
        """
        with self.exclusive() as model:
            check_mergeable(model)

    @property
    def is_mergeable(self) -> bool:
        """Whether the model's caches can be merged."""
        try:
            self.check_mergeable()
        except UnsupportedModelError:
            return False
        return True

    def keeps(self, tokens: int) -> bool:
        """Whether a context of this many tokens fits into the budget of recent contexts."""
        return tokens * self.bytes_per_token <= self.prefixes.max_bytes

    def warn_unless_kept(self, tokens: int) -> None:
        """Warn once if a context of this many tokens exceeds the budget of recent contexts."""
        room = self.prefixes.max_bytes
        if room and not self.keeps(tokens):
            self._notices.once(
                f"a context of more than {room // self.bytes_per_token:,} tokens is larger than prefix_cache_bytes "
                f"({room / 2**30:.2g} GiB), so it is not cached, and the next question encodes it again. Make "
                "prefix_cache_bytes larger, or cache the context yourself with build_kv_cache or KVCacheMemory.",
                CacheWarning,
            )

    def constrain(self, constraint: ConstraintLike, max_new_tokens: int, thinking: bool = False) -> Constraint:
        """Compile a constraint, unless it was compiled before, and check that it fits the budget.

        Args:
            constraint: the form of the answer.
            max_new_tokens: the token budget of the answer.
            thinking: the answer begins inside a thinking block; the constraint holds after that block.

        Raises:
            ConstraintError: the constraint is malformed or not supported, or no text satisfies it.
            ConstraintBudgetError: no text that satisfies it fits the budget.
            MissingExtraError: the extra `structured` is not installed.
        """
        compiled = self._compiler.compile(constraint, thinking=thinking)
        compiled.check_fits(max_new_tokens)
        return compiled

    @cached_property
    def _compiler(self) -> ConstraintCompiler:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        return ConstraintCompiler(self.tokenizer, vocabulary, sorted(self.eos_ids))

    @contextmanager
    def exclusive(self) -> Iterator[PreTrainedModel]:
        """Hold the model for this thread, without gradients. Between two layers, other threads may go first.

        Within `in_background`, it waits until no answer needs the model.

        Raises:
            DeviceMemoryError: the device had too little memory within the block.
        """
        with _memory_errors(), self.lock.acquire(background=_IN_BACKGROUND.get()), torch.no_grad():
            token = BETWEEN_LAYERS.set(self.lock.pause if self._attends_by_sdpa else cancellation().check)
            try:
                yield self.model
            finally:
                BETWEEN_LAYERS.reset(token)

    # --- encoding ----------------------------------------------------------------------------------------------

    def build_kv_cache(self, prompt: str | Sequence[str] | Sequence[Message]) -> ContextCache:
        """Encode a context that `generate` continues.

        Args:
            prompt: a str, or a list of str, which is joined by blank lines, becomes the system turn; chat messages
                become complete turns.

        Returns:
            A `DynamicCache` that the caller owns, with its `token_ids`: keys and values
            `(1, kv_heads, seq_len, head_dim)` per layer, in the model's dtype.

        Raises:
            EmptyPromptError: the prompt is empty.
            ContextLengthError: the prompt is longer than the model's context.
        """
        token_ids, messages = context_ids(self.template, prompt)
        layers, _ = self.prefill(token_ids)
        return ContextCache.of(layers, torch.tensor(token_ids), self.fingerprint, messages)

    def prefill(self, token_ids: Sequence[int], *, namespace: str = "") -> tuple[Layers, int]:
        """Encode tokens, reusing the longest known prefix, and add them to the recent contexts.

        Args:
            token_ids: the tokens.
            namespace: the namespace of the recent contexts.

        Returns:
            Keys and values that the caller owns, `(1, kv_heads, seq_len, head_dim)` per layer, and how many tokens were
            reused.

        Raises:
            EmptyPromptError: there are no tokens.
            ContextLengthError: the tokens exceed the model's context.
        """
        if not token_ids:
            raise EmptyPromptError("there are no tokens to encode")
        self.check_fits(len(token_ids), 0)
        with self._in_flight.prefill(token_ids, namespace, self.known_prefix, background=_IN_BACKGROUND.get()):
            epoch = self.epoch(namespace)
            reused, pieces = self.prefixes.match(token_ids, namespace)
            with _memory_errors():
                cache = generation_cache(pieces, len(token_ids) - reused, self._kinds)
            if reused < len(token_ids):
                self._fill(token_ids, cache, (len(token_ids),), namespace, epoch=epoch)
        return layers_of(cache), reused

    def _fill(
        self,
        token_ids: Sequence[int],
        cache: Cache,
        ends: Iterable[int],
        namespace: str,
        *,
        merged: bool = False,
        epoch: int | None = None,
    ) -> None:
        """Prefill up to the last of `ends`, and cache the prefix at each end, as recurrent layers continue only there.

        Between the ends, a long prompt is also cached at distances at which the states take about as many bytes as the
        keys and values.
        """
        start = cache.get_seq_length()
        for end in sorted({end for end in ends if end > start}):
            while start < end:
                stop = min(end, start + (self._state_distance or _FIRST_CHUNK)) if self._kinds else end
                self.forward(token_ids[start:stop], cache)
                start = stop
                layers = layers_of(cache)
                self.prefixes.insert(token_ids[:stop], layers, namespace, merged=merged, epoch=epoch)
                if layers.states and not self._state_distance:
                    size = nbytes(Layers((), layers.states))
                    self._state_distance = max(_FIRST_CHUNK, size // max(1, self.bytes_per_token))

    def encode_when_idle(self, token_ids: Sequence[int], namespace: str = "") -> None:
        """Encode a context in the background, as a recent context. Returns at once.

        `forget` cancels it. An error is logged, and the context is encoded when a question needs it.
        """
        epoch = self.epoch(namespace)
        if self.keeps(len(token_ids)):
            self._idle.encode(tuple(token_ids), namespace, self._encode_in_background)
        if self.prefixes.epoch(namespace) != epoch:  # `forget` was called in the meantime
            self._idle.cancel(namespace)

    def _encode_in_background(self, token_ids: tuple[int, ...], namespace: str) -> None:
        with self.in_background():
            self.prefill(token_ids, namespace=namespace)

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Within the block, this thread waits whenever an answer needs the model."""
        token = _IN_BACKGROUND.set(True)
        try:
            yield
        finally:
            _IN_BACKGROUND.reset(token)

    def encode_item(self, head_ids: Sequence[int], token_ids: Sequence[int], *, namespace: str = "") -> KVCacheItem:
        """Encode one document after `head_ids`, which become a recent context. See `Engine.encode_item`."""
        return self.item_of(self.encode_after(head_ids, token_ids, namespace=namespace), head_ids, token_ids)

    def item_of(self, layers: Sequence[LayerKV], head_ids: Sequence[int], token_ids: Sequence[int]) -> KVCacheItem:
        """Make the item of a document from its keys and values, `layers`, which were encoded after `head_ids`."""
        return KVCacheItem(
            memory=cache_of(layers),
            token_ids=torch.tensor(token_ids, dtype=torch.long),
            fingerprint=self.fingerprint,
            base_position=len(head_ids),
            prefix_digest=ids_digest(head_ids),
        )

    def exact_context(self, context_ids: Sequence[int], tail_ids: Sequence[int], namespace: str = "") -> MergedContext:
        """Encode a context, reusing the longest known prefix. See `Engine.exact_context`."""
        self.warn_unless_kept(len(context_ids))
        layers, reused = self.prefill(context_ids, namespace=namespace)
        encoded = len(context_ids) - reused
        mode: Mode = "prefix" if reused else "encoded"
        report = MergeReport(mode, "exact", len(context_ids), reused, 0, encoded)
        return self.context_of(layers, context_ids, tail_ids, report)

    def context_of(
        self,
        layers: Sequence[LayerKV],
        context_ids: Sequence[int] | torch.Tensor,
        tail_ids: Sequence[int],
        report: MergeReport,
        read: ReadTail | None = None,
    ) -> MergedContext:
        """Make a context from its keys and values, `layers`, without copying them."""
        return MergedContext(
            cache=cache_of(layers),
            token_ids=torch.as_tensor(context_ids, dtype=torch.long),
            tail_ids=torch.tensor(tail_ids, dtype=torch.long),
            report=report,
            fingerprint=self.fingerprint,
            read=read,
        )

    def known_prefix(self, token_ids: Sequence[int], namespace: str = "", *, merged: bool = False) -> int:
        """Return the length of the longest prefix in the recent contexts; with `merged`, merged ones count too."""
        _ = self.fingerprint  # drops recent contexts if the adapter was switched
        exact = self.prefixes.match(token_ids, namespace)[0]
        return max(exact, self.prefixes.match(token_ids, namespace, merged=True)[0]) if merged else exact

    def forget(self, namespace: str | None = "") -> None:
        """Drop a namespace's recent contexts, and cancel its background encoding; None means all namespaces."""
        self.prefixes.clear(namespace)  # first, so that work which ends from now on sees the new epoch
        self._idle.cancel(namespace)
        self.merge_history.clear(namespace)

    @contextmanager
    def begun(self, namespace: str = "") -> Iterator[None]:
        """Within the block, an answer is prepared. If the namespace is forgotten meanwhile, nothing of it is cached."""
        token = _BEGUN.set(_Begun(self, namespace, self.prefixes.epoch(namespace)))
        try:
            yield
        finally:
            _BEGUN.reset(token)

    def epoch(self, namespace: str = "") -> int:
        """Return the namespace's epoch (`PrefixCache.epoch`) at the beginning of `begun`, or now outside of it."""
        begun = _BEGUN.get()
        mine = begun is not None and begun.engine is self and begun.namespace == namespace
        return begun.epoch if begun is not None and mine else self.prefixes.epoch(namespace)

    def encode_after(self, prefix_ids: Sequence[int], token_ids: Sequence[int], *, namespace: str = "") -> Layers:
        """Encode a document after a prefix, and return the document's keys and values, which the caller owns.

        The prefix becomes a recent context; the document does not, since it is stored as an item.

        Args:
            prefix_ids: the tokens before the document; may be empty.
            token_ids: the tokens of the document.
            namespace: the namespace of the recent contexts.

        Returns:
            Keys and values of each layer, `(1, kv_heads, len(token_ids), head_dim)`, keys rotated to their positions.

        Raises:
            EmptyPromptError: `token_ids` is empty.
            ContextLengthError: both together exceed the model's context.
        """
        if not token_ids:
            raise EmptyPromptError("there are no tokens to encode")
        self.check_fits(len(prefix_ids) + len(token_ids), 0)
        prefix = self.prefill(prefix_ids, namespace=namespace)[0] if prefix_ids else None
        with _memory_errors():
            cache = generation_cache([prefix] if prefix is not None else [], len(token_ids), self._kinds)
            with self._maps_of(cache) as maps:
                self.forward(token_ids, cache)
            layers = contiguous_copy(cut(layers_of(cache), len(prefix_ids)))
            if layers.states:
                layers.states = replace(layers.states, maps=maps(len(token_ids)))
            return layers

    @contextmanager
    def _maps_of(self, cache: Cache) -> Iterator[Callable[[int], Maps]]:
        """`kvcag.cache.states.recording` for a mergeable model with recurrent layers; for others, no maps."""
        if not self._has_maps:
            yield lambda tokens: ()
            return
        with recording(self.model, cache) as maps:
            yield maps

    @cached_property
    def _has_maps(self) -> bool:
        return bool(self._kinds) and self.is_mergeable

    # --- answering ---------------------------------------------------------------------------------------------

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
        """Answer a prompt, over a context that it begins with, if one is passed. See `Engine.stream`.

        The longest known prefix is reused, and prompt and answer become a recent context. Of an exact context that
        differs from the prompt at some token, the tokens before are reused.
        """
        started = started or time.perf_counter()
        token_ids = prompt.token_ids
        if not token_ids:
            raise EmptyPromptError("the prompt has no tokens")
        max_new_tokens = self.check_fits(len(token_ids), sampling.max_new_tokens)
        compiled = None if constraint is None else self.constrain(constraint, max_new_tokens, prompt.thinking)
        ids: Any = np.asarray(token_ids, dtype=np.int64)  # once, as it takes a millisecond for 32,000 tokens
        given = reusable_prefix(past_key_values, ids, self.fingerprint)
        epoch = self.epoch(namespace)
        if past_key_values is None:
            self.warn_unless_kept(len(token_ids))

        def run() -> Generator[Chunk, None, None]:
            def known(token_ids: Sequence[int], namespace: str) -> int:
                if given.is_merged or not self.keeps(len(token_ids)):
                    return len(token_ids)  # do not wait for another prompt's prefill, which would not be used
                return max(given.length, self.known_prefix(token_ids, namespace, merged=accept_merged))

            with self._in_flight.prefill(ids[:-1], namespace, known), _memory_errors():
                prefix = given.longest(self.prefixes, ids[:-1], namespace, merged=accept_merged)
                reused, pieces = prefix.length, prefix.pieces
                read = given.read if reused == given.length else None
                if read is not None:
                    pieces = [*pieces, layers_of(read.cache)]
                kept = len(token_ids) - reused if self.keeps(len(token_ids)) else 0
                room = len(token_ids) - reused + max_new_tokens
                decoding = Decoding(
                    self.predict,
                    self.ask,
                    generation_cache(pieces, room, self._kinds, lent=self._cuda_graphs),
                    token_ids,
                    max_new_tokens=max_new_tokens,
                    eos_ids=self.eos_ids,
                    sampler=Sampler(sampling, self.device, compiled.start(max_new_tokens) if compiled else None),
                    account=Account.of(prompt, given.report, prefix, kept, started),
                )
                if self._kinds and self.keeps(len(token_ids)):
                    ends = _segment_ends(prompt)
                    self._fill(token_ids, decoding.cache, ends, namespace, merged=prefix.is_merged, epoch=epoch)
                decoding.prefill(None if read is None else Prediction(read.logits))
                held = partial(behind, decoding.cache)
                if self.keeps(len(ids)):
                    self.prefixes.insert(ids, held, namespace, merged=prefix.is_merged, epoch=epoch)
            thinking = ThinkingFilter(prompt.thinking, strips=sampling.strip_thinking)
            whole = False  # after an error in the middle of a step, the layers' lengths differ
            try:
                for chunk in decoding.chunks(Detokenizer(self.tokenizer), StopStrings(sampling.stop), thinking):
                    whole = True
                    yield chunk
                    whole = False
                whole = True
            finally:
                if whole and self.keeps(len(ids)):
                    self.prefixes.insert(decoding.cached_ids, held, namespace, merged=prefix.is_merged, epoch=epoch)

        return run()

    def forward(self, token_ids: Sequence[int] | torch.Tensor, cache: Cache) -> torch.Tensor:
        """Run tokens over a cache, which grows by them; return the logits of the last token, `(1, vocabulary)`.

        On a GPU, this returns before the logits are computed.

        Args:
            token_ids: at least one token; or one token on the device, int64 `(1,)`.
            cache: from `generation_cache`.

        Raises:
            DeviceMemoryError: the device has too little memory.
        """
        return self.predict(token_ids, cache).logits

    def predict(self, token_ids: Sequence[int] | torch.Tensor, cache: Cache) -> Prediction:
        """Run `forward`, and return its logits with the likeliest token, if the pass computes it.

        If the device has too little memory for a pass, this and later passes are split into shorter ones. If this
        fails too, the cache is restored to its state before the pass.

        Args:
            token_ids: as for `forward`.
            cache: as for `forward`.

        Raises:
            DeviceMemoryError: the device has too little memory.
        """
        prediction, start, failed = Prediction(torch.empty(0)), 0, False
        while start < len(token_ids):
            tokens = self._chunk_tokens
            if _IN_BACKGROUND.get() and self.device.type == "cpu":
                tokens = max(_SHORTEST_CHUNK, int(tokens * _BACKGROUND_LAYER_SECONDS / _LAYER_SECONDS))
            if self._kinds and self._reads_singly:
                tokens = 1 if cache.get_seq_length() else len(token_ids)
            chunk = token_ids[start : start + tokens]
            past = cache.get_seq_length()
            try:
                with self.exclusive():
                    captured = self._captured(chunk, cache) if self._cuda_graphs else None
                    prediction = captured or Prediction(self._uncaptured(chunk, cache))
            except DeviceMemoryError:
                if self._kinds:  # recurrent states cannot be restored
                    raise
                crop(cache, past)
                if failed:
                    raise
                failed = True
                self._longest_chunk = max(_SHORTEST_CHUNK, min(self._longest_chunk, len(chunk)) // 4)
                self._chunk_tokens = min(self._chunk_tokens, self._longest_chunk)
                torch.cuda.empty_cache()
                continue
            start += len(chunk)
        return prediction

    def with_memory(self, work: Callable[[], T]) -> T:
        """Call `work` and return its result. If the device has too little memory, call it once more.

        Before the second call, PyTorch's unused memory is released, and captured passes for merging are switched off.

        Raises:
            DeviceMemoryError: the device has too little memory for the second call.
        """
        try:
            return work()
        except DeviceMemoryError as error:
            _LOG.warning("%s Trying once more.", error)
            if (graphs := self.__dict__.get("_graphs")) is not None:
                graphs.merges = False
            torch.cuda.empty_cache()
        return work()

    @cached_property
    def _reads_singly(self) -> bool:
        """Whether only single tokens can continue from the states of this model's recurrent layers."""
        with self.exclusive() as model:
            return ignores_states(model)

    def ask(self, token: Sequence[int] | torch.Tensor, cache: Cache, *, now: bool) -> Pending:
        """Ask for a step: `predict` for one token, in a batch with the steps that other generations ask for."""
        if self._takes_several and not _IN_BACKGROUND.get():
            return self._steps.ask(token, cache, now=now)
        return Alone(self.predict, token, cache, now=now)

    @property
    def _takes_several(self) -> bool:
        """Whether a pass can run one token for each of several generations. The first step finds out."""
        graphs = self.__dict__.get("_graphs")  # checked first, because the model's device takes long to look up
        if graphs is not None:
            return graphs.alone is None
        known = bool(self.__dict__.get("_by_position"))
        return known and self.device.type == "cpu" and self._attends_to_its_own

    def _together(self, tokens: list[Any], caches: list[Cache]) -> list[Prediction]:
        """Take a step of several generations in one pass. After an error, the caches are restored."""
        lengths = [cache.get_seq_length() for cache in caches]
        try:
            if self.device.type == "cuda":
                return self._captured_together(tokens, caches)
            step = self._step_over(caches)
            if step is not None and step.agrees:
                stepped = step([int(token) for [token] in tokens], cast("list[GenerationCache]", caches))
                return [Prediction(row) for row in torch.split(stepped, 1)]
            ids = torch.tensor(tokens, device=self.device)
            with by_row(self.model, caches) as rows:
                at = torch.tensor(lengths, device=self.device)[:, None]
                given = cache_argument(self.model, rows)
                logits = self.model(input_ids=ids, position_ids=at, use_cache=True, **given).logits[:, -1]
            return [Prediction(row) for row in logits.split(1)]
        except BaseException:
            for cache, length in zip(caches, lengths, strict=True):
                crop(cache, length)
            raise

    def _captured_together(self, tokens: list[Any], caches: list[Cache]) -> list[Prediction]:
        graphs = self._graphs
        taken = [graphs is not None and graphs.takes(1, cache) for cache in caches]
        together = [i for i, takes in enumerate(taken) if takes]
        predictions = {i: self.predict(tokens[i], caches[i]) for i, takes in enumerate(taken) if not takes}
        if together:
            assert graphs is not None
            try:
                found = graphs.step([tokens[i] for i in together], [caches[i] for i in together])  # type: ignore[misc]
            except torch.OutOfMemoryError:
                graphs.alone = "the device had too little memory for passes of several generations"
                raise
            predictions |= dict(zip(together, found, strict=True))
        return [predictions[i] for i in range(len(caches))]

    def _captured(self, token_ids: Sequence[int] | torch.Tensor, cache: Cache) -> Prediction | None:
        """Run a pass as a CUDA graph; None if no graph supports it."""
        past = cache.get_seq_length()
        if past == 0 or self.device.type != "cuda" or self._kinds:
            return None
        try:
            graphs = self._graphs
            taken = graphs is not None and graphs.takes(len(token_ids), cache)
            return graphs.forward(token_ids, cache) if taken else None  # type: ignore[union-attr, arg-type]
        except torch.OutOfMemoryError:
            self._give_up_graphs("the device had too little memory for them")
            crop(cache, past)
            return None

    @property
    def merge_passes(self) -> Passes | None:
        """Faster passes for merging; None if there are none for this model and device."""
        if not self._cuda_graphs or self.device.type != "cuda" or self._kinds:
            return None
        return self._graphs

    @cached_property
    def _graphs(self) -> Graphs | None:
        """The model's captured passes; None if it cannot be captured."""
        try:
            from kvcag.engines.cuda.graphs import Graphs  # needs Triton, which comes with PyTorch for CUDA

            return Graphs(self.model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the boundary: after any error of a compiler or driver, run without graphs
            self._give_up_graphs(str(error) or type(error).__name__)
            return None

    def _give_up_graphs(self, why: str) -> None:
        self._cuda_graphs, self._without_graphs = False, f"off: {why}"
        self.__dict__["_graphs"] = None
        torch.cuda.empty_cache()
        _LOG.warning("%s runs without CUDA graphs: %s", type(self.model).__name__, why)

    def _uncaptured(self, token_ids: Sequence[int] | torch.Tensor, cache: Cache) -> torch.Tensor:
        past = cache.get_seq_length()
        step = self._step_over([cache]) if len(token_ids) == 1 and past else None
        stepped = None if step is None else step([int(token_ids[0])], [cast("GenerationCache", cache)])
        if step is not None and stepped is not None:
            if step.agrees:
                return stepped
            crop(cache, past)
        began = time.thread_time()
        with self._attention(past, len(token_ids)):
            logits: torch.Tensor = run(self.model, torch.as_tensor(token_ids), cache, last=True).logits
        self._fit_chunk(len(token_ids), time.thread_time() - began)
        if step is not None and stepped is not None:
            step.compare(stepped, logits[:, -1])
        return logits[:, -1]

    def _step_over(self, caches: Sequence[Cache]) -> Step | None:
        """Return the model's `Step` on a CPU; None if it has no `Step`, or if its logits differ from the model's."""
        step = self._step
        if step is not None and not step.is_current:  # adapters were loaded or unloaded
            del self._step
            step = self._step
        return step if step is not None and step.agrees is not False and step.takes(caches) else None

    @cached_property
    def _step(self) -> Step | None:
        return Step.of(self.model) if self.device.type == "cpu" and self._by_position else None

    def _fit_chunk(self, tokens: int, seconds: float) -> None:
        """Adapt the length of prefill passes to the time per layer; `seconds` is the CPU time of the last pass."""
        if self.device.type != "cpu":
            self._chunk_tokens = self._longest_chunk
        elif tokens == self._chunk_tokens:
            allowed = tokens * _LAYER_SECONDS * self._layers / max(seconds, 1e-9)
            self._chunk_tokens = int(min(max(allowed, tokens / 2, _SHORTEST_CHUNK), tokens * 2, self._longest_chunk))

    @cached_property
    def _layers(self) -> int:
        return int(self.fingerprint.geometry.split("x")[0])

    def _attention(self, past: int, new: int) -> AbstractContextManager[None]:
        """Use kvcag's attention for tokens over a cache. A whole prompt, or one token on a GPU, needs no mask."""
        if past == 0 or not self._by_position or (new == 1 and self.device.type != "cpu"):
            return nullcontext()
        return by_position(self.model, torch.arange(past, past + new))

    @property
    def _attends_by_sdpa(self) -> bool:
        """Whether the model attends by `sdpa`, so that passes of several threads may interleave in the model."""
        return decoder_of(self.model).config._attn_implementation in ("sdpa", OVER_SDPA)

    @cached_property
    def _attends_to_its_own(self) -> bool:
        return attends_to_its_own(self.model)

    @cached_property
    def _by_position(self) -> bool:
        return self._attends_by_sdpa and not self._kinds and self.is_mergeable


def _segment_ends(prompt: Prompt) -> list[int]:
    """Return the ends of the instruction and of each document, as positions in the prompt."""
    ends = [*accumulate([len(prompt.head_ids), *map(len, prompt.document_ids)])]
    return [end for end in ends if 0 < end < len(prompt.token_ids)]


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the device has too little memory ({error}). Pass fewer documents, lower max_new_tokens, or make "
            "prefix_cache_bytes smaller."
        ) from error


_ENGINES: WeakSet[HFEngine] = WeakSet()


def _in_forked_child() -> None:
    """Prepare the parent's engines for use in a forked process.

    The process has none of the parent's threads. So locks are made new, and PyTorch computes with one thread, because
    it would wait for its thread pool for ever. With an engine on a GPU, PyTorch raises that CUDA cannot be used after a
    fork.
    """
    for engine in list(_ENGINES):
        engine._begin(engine.prefixes.max_bytes)
    if _ENGINES:
        put_back_attention()
        put_back_onednn()
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
