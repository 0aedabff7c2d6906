"""The connector that vLLM loads by `--kv-transfer-config`, which moves keys and values between a server and a store.

vLLM makes two objects of it: one in the scheduler, which tells what the store has, and one in the worker, which copies
keys and values between the store and the server's blocks. This module imports vLLM; code that does not need vLLM is in
`kvcag.engines.vllm.blocks`.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from vllm import _custom_ops as ops
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvcag.cache.layers import LayerKV, Layers, cache_of, concat, contiguous_copy, cut, layers_of, mapped
from kvcag.core import KVCacheItem, content_key, ids_digest
from kvcag.engines.vllm.blocks import (
    FIELD,
    Asked,
    BlockLayout,
    CPUAttentionLayout,
    FlashAttentionLayout,
    Learned,
    Piece,
    candidates_of,
    placed,
    prefix_pieces,
    space_of,
)
from kvcag.errors import CorruptItemError, InvalidInputError, KVCAGError, TokenMismatchError, UnsupportedModelError
from kvcag.fingerprint import KVCacheRecords, ModelFingerprint
from kvcag.stores.base import KVStore
from kvcag.stores.remote import open_at

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_log = logging.getLogger("vllm.kvcag")
_UNWRITTEN = 64
"""The most prompts whose keys and values wait in memory to be written. With more, the server waits for the oldest."""
_ROTARY = {"RotaryEmbedding": "base", "Llama3RotaryEmbedding": "base", "YaRNScalingRotaryEmbedding": "scaling_factor"}
"""The rotary classes of vLLM that rotate a pair by position × frequency, and the attribute for their frequencies."""


@dataclass
class _Load:
    """Tokens `start` to `stop` of a request's prompt, which the worker loads into the request's blocks."""

    space: str
    token_ids: list[int]
    pieces: list[Piece]
    start: int
    stop: int
    block_ids: list[int] = field(default_factory=list)


@dataclass
class _Save:
    """A prompt whose prefill ends in this step, and the pieces of it that the worker stores.

    Attributes:
        learn: documents from which to learn the usual drift, instead of storing `pieces`.
        at_once: wait until the pieces are written, because the client needs them.
    """

    space: str
    token_ids: list[int]
    block_ids: list[int]
    pieces: list[Piece]
    learn: list[Piece]
    at_once: bool


@dataclass
class _Step(KVConnectorMetadata):  # type: ignore[misc]
    loads: list[_Load] = field(default_factory=list)
    saves: list[_Save] = field(default_factory=list)


class KVCAGConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Loads the prefix of a prompt, or documents in any order, from a store, and stores the prompts that are prefilled.

    `kv_connector_extra_config` has `store`, a folder or an fsspec URL, and may have `max_bytes` (of a folder, per
    namespace) and `storage_options` (of a URL). The fields of a request are those of
    `kvcag.engines.vllm.blocks.Asked`.

    Raises:
        InvalidInputError: the configuration names no store, or blocks that failed to load would be used.
        UnsupportedModelError: the connector cannot read and write the blocks of this model, cache or parallelism.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        _check(vllm_config, kv_cache_config)
        [group] = kv_cache_config.kv_cache_groups
        self._spec = group.kv_cache_spec
        self._size: int = self._spec.block_size
        self._fingerprint = _fingerprint_of(vllm_config, self._spec, len(group.layer_names))
        self._digest = self._fingerprint.digest
        self._stores: dict[str, KVStore] = {}
        self._store("")  # to refuse a store that cannot be opened when the server starts
        # In the scheduler:
        self._open: dict[str, Request] = {}
        self._loads: dict[str, _Load] = {}
        self._reused: dict[str, int] = {}
        # In the worker:
        self._layers: list[tuple[torch.Tensor, BlockLayout]] = []
        self._failed: set[int] = set()
        self._learned: dict[str, Learned] = {}
        self._writer = ThreadPoolExecutor(1, "kvcag-writer")
        self._unwritten: deque[Future[None]] = deque()

    # --- the store -----------------------------------------------------------------------------------------------

    def _store(self, space: str) -> KVStore:
        """Return the store of a namespace. `space` is the namespace's salt."""
        if space not in self._stores:
            given = self._kv_transfer_config.kv_connector_extra_config
            options = given.get("storage_options", {})
            self._stores[space] = open_at(str(given["store"]), space, given.get("max_bytes"), **options)
        return self._stores[space]

    def _has(self, space: str, id: str) -> bool:
        """Whether the store has an item. False if the store fails, so that the server prefills."""
        try:
            return self._store(space).contains(id)
        except KVCAGError as error:
            _log.warning("the store failed, so prompts are prefilled: %s", error)
            return False

    def _documents(
        self, token_ids: list[int], spans: list[tuple[int, int]], endings: Sequence[list[int]] = ()
    ) -> list[Piece]:
        behind = chain(endings, repeat([]))
        ids = (token_ids[start:stop] + ending for (start, stop), ending in zip(spans, behind, strict=False))
        return [Piece(content_key(self._digest, own), *span) for own, span in zip(ids, spans, strict=True)]

    @property
    def _learned_id(self) -> str:
        return f"kv:learned:{self._digest}"

    # --- in the scheduler ----------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens after `num_computed_tokens` are in the store."""
        self._loads.pop(request.request_id, None)
        self._reused[request.request_id] = num_computed_tokens
        token_ids = _plain_ids(request)
        (space, is_merged), asked = space_of(request.cache_salt), _asked(request)
        if asked is not None and asked.forget:
            self._store(space).clear()
            return 0, False
        if is_merged:
            has_learned = self._has(space, self._learned_id)
            pieces = self._documents(token_ids, asked.merge, asked.endings) if asked and has_learned else []
            found = next((at for at, piece in enumerate(pieces) if not self._has(space, piece.id)), len(pieces))
        else:
            pieces = prefix_pieces(self._digest, token_ids, self._size)
            first = num_computed_tokens // self._size
            found = bisect_left(pieces, True, first, key=lambda piece: not self._has(space, piece.id))
        reached = pieces[found - 1].stop if found else 0
        stop = min(reached, len(token_ids) - 1) // self._size * self._size  # the last token is always computed
        if stop <= num_computed_tokens:
            return 0, False
        self._loads[request.request_id] = _Load(space, token_ids, pieces[:found], num_computed_tokens, stop)
        return stop - num_computed_tokens, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Let the next step load into the blocks that were allocated."""
        self._open[request.request_id] = request
        if num_external_tokens:
            self._reused[request.request_id] += num_external_tokens
            self._loads[request.request_id].block_ids = list(blocks.get_block_ids()[0])
        else:
            self._loads.pop(request.request_id, None)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Tell the worker what to load in this step, and which prompts, whose prefill ends in it, to store."""
        again = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(again.req_ids, again.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        step = _Step(loads=[load for load in self._loads.values() if load.block_ids])
        self._loads = {id: load for id, load in self._loads.items() if not load.block_ids}
        for id, tokens in scheduler_output.num_scheduled_tokens.items():
            request = self._open.get(id)
            if request is not None and computed[id] < request.num_prompt_tokens <= computed[id] + tokens:
                step.saves += self._kept_of(request)
        return step

    def _kept_of(self, request: Request) -> list[_Save]:
        """Return what to store of a request: nothing if it merges, since its keys and values are approximate then."""
        token_ids = _plain_ids(request)
        (space, is_merged), asked = space_of(request.cache_salt), _asked(request)
        if is_merged or not token_ids:
            return []
        [block_ids] = self._kv_cache_manager.get_block_ids(request.request_id)
        spans, passages = (asked.keep, asked.learn) if asked else ([], [])
        pieces = self._documents(token_ids, spans) if spans else prefix_pieces(self._digest, token_ids, self._size)
        learn = self._documents(token_ids, passages)
        return [_Save(space, token_ids, list(block_ids), pieces if not learn else [], learn, bool(spans or learn))]

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Return the fields of the response to a request that has fields for the connector."""
        self._open.pop(request.request_id, None)
        self._loads.pop(request.request_id, None)
        reused = self._reused.pop(request.request_id, 0)
        asked = _asked(request)
        if asked is None:
            return False, None
        space, is_merged = space_of(request.cache_salt)
        return False, {
            FIELD: {
                "model": self._digest,
                "block_size": self._size,
                "learned": self._has(space, self._learned_id),
                "missing": [id for id in asked.has if not self._has(space, id)],
                "mode": ("merged" if is_merged else "prefix") if reused else "encoded",
                "reused_tokens": reused,
            }
        }

    # --- in the worker -------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the server's blocks. An unknown layout is refused here, before the first request.

        Raises:
            UnsupportedModelError: the layout of the attention backend's blocks is unknown, or it splits blocks.
        """
        layers = self._vllm_config.compilation_config.static_forward_context
        names = sorted(kv_caches, key=extract_layer_index)
        if sizes := {cache.shape[2] for cache in kv_caches.values()} - {self._size}:
            raise UnsupportedModelError(
                f"the attention backend splits each block of {self._size} tokens. "
                f"Start the server with --block-size {min(sizes)}."
            )
        layouts: dict[str, BlockLayout] = {}
        for name in names:
            backend = layers[name].attn_backend.get_name()
            if backend not in layouts:
                layouts[backend] = _layout_of(backend, kv_caches[name])
        self._layers = [(kv_caches[name], layouts[layers[name].attn_backend.get_name()]) for name in names]

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Load this step's tokens into their blocks. The server computes tokens that cannot be loaded."""
        for load in self._get_connector_metadata().loads:
            try:
                self._write(load)
            except Exception as error:  # after any error, the server computes these tokens
                _log.warning("%d tokens are prefilled, since they cannot be loaded: %s", load.stop - load.start, error)
                self._failed.update(load.block_ids[load.start // self._size : load.stop // self._size])

    def _write(self, load: _Load) -> None:
        found = list(
            placed(
                load.pieces,
                load.token_ids,
                load.start,
                load.stop,
                partial(self._get, load.space),
                self._fingerprint,
                lambda: self._learned_in(load.space),
            )
        )
        blocks = torch.tensor(load.block_ids[load.start // self._size : load.stop // self._size])
        for (cache, layout), kv in zip(self._layers, concat([layers for *_, layers in found]), strict=True):
            layout.write(cache, blocks, kv)

    def _get(self, space: str, id: str) -> KVCacheItem | None:
        """Return an item. A damaged item is deleted, so that it is encoded again."""
        try:
            return self._store(space).get(id)
        except CorruptItemError:
            self._store(space).delete([id])
            raise

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: `start_load_kv` loaded all layers."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: `wait_for_save` stores all layers, since a replayed CUDA graph does not call this method."""

    def wait_for_save(self) -> None:
        """Copy prompts out of the blocks, for a thread that writes them to the store. Wait until documents are written.

        After a load failed in this step, nothing is stored, since this step may have computed with empty blocks.
        """
        for save in self._get_connector_metadata().saves if not self._failed else ():
            layers = self._read(save.block_ids, len(save.token_ids))
            job = self._writer.submit(self._learn if save.learn else self._keep, save, layers)
            self._unwritten.append(job)
            while self._unwritten and (save.at_once or len(self._unwritten) > _UNWRITTEN):
                self._unwritten.popleft().result()

    def _read(self, block_ids: list[int], tokens: int) -> Layers:
        blocks = torch.tensor(block_ids[: -(-tokens // self._size)])
        whole: list[LayerKV] = [layout.read(cache, blocks) for cache, layout in self._layers]
        return mapped(cut(whole, 0, tokens), lambda tensor: tensor.to("cpu"))

    def _keep(self, save: _Save, layers: Layers) -> None:
        try:
            store = self._store(save.space)
            text = self._tokenizer.decode(save.token_ids, skip_special_tokens=False)
            for piece in save.pieces:
                if store.contains(piece.id):
                    continue
                ids = save.token_ids[piece.start : piece.stop]
                is_prefix = piece.id.startswith("kv:prefix:")
                said = text if is_prefix else self._tokenizer.decode(ids, skip_special_tokens=False)
                item = KVCacheItem(
                    id=piece.id,
                    memory=cache_of(contiguous_copy(cut(layers, piece.start, piece.stop))),
                    token_ids=torch.tensor(ids, dtype=torch.long),
                    records=KVCacheRecords(text_memories=[said], composed_text_memory=said),
                    fingerprint=self._fingerprint,
                    base_position=piece.start,
                    prefix_digest=ids_digest(save.token_ids[: piece.start]),
                )
                store.put(item)
        except Exception as error:  # the boundary of the thread: no answer depends on it
            _log.warning("a prompt's keys and values were not stored: %s", error)

    def _learn(self, save: _Save, layers: Layers) -> None:
        try:
            store = self._store(save.space)
            if store.contains(self._learned_id):
                return
            first, *others = save.learn
            items = [store.get(piece.id) for piece in others]
            if not items or any(item is None for item in items):
                raise TokenMismatchError("the documents to learn from are not in the store")
            found = [item for item in items if item is not None]
            alone = concat([layers_of(item.memory) for item in found])
            alone_at = torch.cat([item.base_position + torch.arange(len(item.token_ids)) for item in found])
            at = torch.arange(first.stop, others[-1].stop)
            together = cut(layers, first.stop, others[-1].stop)
            learned = Learned.between(self._candidates, alone, alone_at, together, at)
            store.put(learned.to_item(self._learned_id, self._candidates, self._fingerprint))
        except Exception as error:  # the boundary of the thread: the server merges nothing until the drift is learned
            _log.warning("the server merges no documents, since the usual drift was not learned: %s", error)

    def _learned_in(self, space: str) -> Learned:
        if space not in self._learned:
            item = self._store(space).get(self._learned_id)
            if item is None:
                raise TokenMismatchError("the usual drift of documents is not in the store")
            self._learned[space] = Learned.of_item(item, self._candidates)
        return self._learned[space]

    @cached_property
    def _candidates(self) -> list[Any]:
        kinds = {type(rotary).__name__ for rotary in _ROPE_DICT.values()}
        if len(_ROPE_DICT) != 1 or not kinds <= _ROTARY.keys():
            raise UnsupportedModelError(
                f"merging needs one rotary embedding, of {', '.join(_ROTARY)}; this model has {len(_ROPE_DICT)}, of "
                f"{', '.join(sorted(kinds)) or 'none'}. Use strategy='exact'."
            )
        [rotary] = _ROPE_DICT.values()
        frequencies = rotary._compute_inv_freq(getattr(rotary, _ROTARY[kinds.pop()]))
        return candidates_of(frequencies.cpu(), interleaved=not rotary.is_neox_style)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._vllm_config.model_config.tokenizer)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return this step's blocks that could not be loaded."""
        failed, self._failed = self._failed, set()
        return failed

    def shutdown(self) -> None:
        """Wait until all prompts are written."""
        self._writer.shutdown()


# --- configuration and model -------------------------------------------------------------------------------------


def _check(config: VllmConfig, cache: KVCacheConfig) -> None:
    """Refuse, when the server starts, a configuration or a model whose blocks cannot be loaded or stored correctly."""
    given, parallel = config.kv_transfer_config, config.parallel_config
    if not given.kv_connector_extra_config.get("store"):
        raise InvalidInputError(
            "the configuration names no store. Add "
            '"kv_connector_extra_config": {"store": "/a/folder or s3://a/bucket"}.'
        )
    if given.kv_load_failure_policy != "recompute":
        raise InvalidInputError(
            'a damaged file would fail its request. Set "kv_load_failure_policy": "recompute", so that the server '
            "computes these tokens."
        )
    if config.max_concurrent_batches > 1:
        raise InvalidInputError(
            "with asynchronous scheduling, a step could read blocks whose load has failed. Start the server with "
            "--no-async-scheduling."
        )
    if config.shutdown_timeout == 0:
        _log.warning("without --shutdown-timeout 30, a server that is stopped loses the last prompts' keys and values")
    if parallel.world_size > 1:
        raise UnsupportedModelError(
            f"each of {parallel.world_size} workers has only a part of the heads or layers. Use one GPU per server."
        )
    if config.speculative_config is not None:
        raise UnsupportedModelError("a draft model has its own blocks. Start the server without speculative decoding.")
    specs = [group.kv_cache_spec for group in cache.kv_cache_groups]
    if len(specs) != 1 or type(specs[0]) is not FullAttentionSpec:
        kinds = ", ".join(type(spec).__name__ for spec in specs)
        raise UnsupportedModelError(
            f"the connector supports only models whose layers all have full attention; this model has {kinds}. "
            "Start the server without KVCAGConnector."
        )
    [spec] = specs
    if (
        spec.sliding_window
        or spec.attention_chunk_size
        or spec.head_size != getattr(spec, "head_size_v", spec.head_size)
    ):
        raise UnsupportedModelError(
            "the connector does not support layers with a window, or with values of another size than keys. "
            "Start the server without KVCAGConnector."
        )
    if spec.dtype != config.model_config.dtype:
        raise UnsupportedModelError(
            f"the cache's dtype {spec.dtype} is not the model's {config.model_config.dtype}. "
            "Start the server with --kv-cache-dtype auto."
        )


def _layout_of(backend: str, cache: torch.Tensor) -> BlockLayout:
    _, _, size, both = cache.shape
    if backend == CPUAttentionLayout.backend:
        isa, slots = _get_attn_isa(cache.dtype, size, both // 2), torch.arange(size)

        def put(keys: torch.Tensor, values: torch.Tensor, block: torch.Tensor) -> None:
            halves = block.view(1, 1, 2 * size, both // 2).chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(
                keys, values, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
            )

        return CPUAttentionLayout(put, size, both // 2, cache.dtype)
    if backend == FlashAttentionLayout.backend:
        return FlashAttentionLayout()
    raise UnsupportedModelError(
        f"the block layout of {backend} is unknown. Start the server with --attention-backend FLASH_ATTN."
    )


def _fingerprint_of(config: VllmConfig, spec: Any, layers: int) -> ModelFingerprint:
    model = config.model_config
    return ModelFingerprint(
        model_name=model.model,
        revision=model.revision,
        architecture=f"vllm:{','.join(model.architectures)}",
        dtype=str(model.dtype).removeprefix("torch."),
        geometry=f"{layers}x{spec.num_kv_heads}x{spec.head_size}",
        config=model.hf_text_config.to_json_string(use_diff=False),
        adapter=str(model.quantization or "") or None,
        weights=_digest_of_files(_folder_of(model.model, model.revision)),
        tokenizer="",
        template="",
    )


def _folder_of(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, local_files_only=True))


@lru_cache(maxsize=4)
def _digest_of_files(folder: Path) -> str:
    """Return a digest of the weight files, so that servers with equal files share a store under any folder name."""
    digest = xxhash.xxh3_128()
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin", ".pt", ".gguf")]
    if not files:
        raise UnsupportedModelError(
            f"{folder} has no file with weights, by which models are told apart. Pass a folder with the weights."
        )
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _plain_ids(request: Request) -> list[int]:
    """Return the prompt's tokens; empty, so that nothing is loaded or stored, if keys depend on more than tokens."""
    depends = request.mm_features or request.lora_request or request.prompt_embeds is not None
    return [] if depends or request.prompt_token_ids is None else list(request.prompt_token_ids)


def _asked(request: Request) -> Asked | None:
    """Return the request's fields for the connector; None, with a log message, if they cannot be read."""
    try:
        return Asked.of(request.kv_transfer_params, request.num_prompt_tokens)
    except InvalidInputError as error:
        _log.warning("%s", error)
        return None
