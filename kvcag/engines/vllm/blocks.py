"""What a vLLM server's connector needs beside vLLM: spans of prompts, keys of pieces, layouts of blocks, placing."""

from __future__ import annotations

import base64
import hashlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from kvcag.cache.attention import UNROTATED, PositionShift, Rotation
from kvcag.cache.layers import LayerKV, Layers, cache_of, contiguous_copy, cut, layers_of
from kvcag.cache.merge import UsualDrift
from kvcag.core import KVCacheItem, ids_digest
from kvcag.errors import InvalidInputError, TokenMismatchError, UnsupportedModelError
from kvcag.fingerprint import ModelFingerprint

FIELD = "kvcag"
"""The field of `kv_transfer_params` that is ours."""

# --- what a request asks for -----------------------------------------------------------------------------------

_MERGED = "kvcag-merged."
_Edge: TypeAlias = Annotated[int, Field(strict=True, ge=0)]
Span: TypeAlias = tuple[_Edge, _Edge]


class Asked(BaseModel):
    """What a request says in `kv_transfer_params["kvcag"]`. A span is `[start, stop)`, in tokens of the prompt.

    Attributes:
        merge: the instruction and its documents: spans that begin at 0, each where the one before ends. They are
            loaded, moved to where they stand, and written into the server's blocks. The salt must be `merged_salt`.
        endings: what follows the tokens of each span of `merge` where it is kept, and not in this prompt; or nothing.
        keep: spans to be kept as documents of their own, as they are computed in this prompt.
        learn: documents by which the server learns how keys are rotated and what documents usually drift by: the
            prompt holds them one behind another, and each was kept behind what stands before the first.
        has: ids of items; the answer names those that are missing.
        forget: delete everything that the namespace has in the store.
    """

    model_config = ConfigDict(extra="forbid")

    merge: list[Span] = Field(default_factory=list, max_length=4096)
    endings: list[list[_Edge]] = Field(default_factory=list, max_length=4096)
    keep: list[Span] = Field(default_factory=list, max_length=4096)
    learn: list[Span] = Field(default_factory=list, max_length=4096)
    has: list[str] = Field(default_factory=list, max_length=4096)
    forget: bool = False

    @classmethod
    def of(cls, params: Mapping[str, Any] | None, tokens: int) -> Asked | None:
        """What a request for a prompt of `tokens` asks for; None for nothing of ours.

        Raises:
            InvalidInputError: it cannot be read, or a span is empty, out of order, or not within the prompt.
        """
        if not params or params.get(FIELD) is None:
            return None
        try:
            asked = cls.model_validate(params[FIELD])
        except ValidationError as error:
            raise InvalidInputError(f"kv_transfer_params[{FIELD!r}] cannot be read: {error}") from None
        if any(spans and spans[-1][1] > tokens for spans in (asked.merge, asked.keep, asked.learn)):
            raise InvalidInputError(
                f"a span of kv_transfer_params[{FIELD!r}] ends behind the prompt of {tokens} tokens"
            )
        return asked

    @model_validator(mode="after")
    def _check_spans(self) -> Self:
        for spans in (self.merge, self.keep, self.learn):
            edges = [edge for span in spans for edge in span]
            if any(start >= stop for start, stop in spans) or edges != sorted(edges):
                raise ValueError("spans must hold tokens, and stand in order")
        stops = [0, *(stop for _, stop in self.merge)]
        if any(start != before for (start, _), before in zip(self.merge, stops, strict=False)):
            raise ValueError("the spans of merge must begin at 0, each where the one before ends")
        if self.endings and len(self.endings) != len(self.merge):
            raise ValueError("there must be an ending for each span of merge, or none")
        return self


def merged_salt(context_ids: Sequence[int], salt: str | None) -> str:
    """The salt of a request that merges: the server's blocks of it serve the same context alone.

    A server believes that equal tokens under equal salts have equal keys and values. Merged ones are an approximation,
    so they have a salt that no other request has.

    Args:
        context_ids: the tokens of instruction and documents.
        salt: the salt of the namespace.
    """
    digest = base64.urlsafe_b64encode(bytes.fromhex(ids_digest(context_ids))).decode().rstrip("=")
    return f"{_MERGED}{digest}.{salt or ''}"


def space_of(salt: str | None) -> tuple[str, bool]:
    """The namespace of the store that a salt stands for, and whether it is a `merged_salt`."""
    if salt is None or not salt.startswith(_MERGED):
        return salt or "", False
    return salt.removeprefix(_MERGED).partition(".")[2], True


@dataclass(frozen=True, slots=True)
class Piece:
    """An item of the store, and the tokens `start` to `stop` of a prompt that it begins with."""

    id: str
    start: int
    stop: int


def prefix_pieces(model_digest: str, token_ids: Sequence[int], size: int) -> list[Piece]:
    """A prompt's beginning in pieces of `size` tokens; the id of each says all tokens up to its end. O(tokens)."""
    so_far, pieces = hashlib.sha256(model_digest.encode()), []
    for start in range(0, len(token_ids) - size + 1, size):
        so_far.update(array("I", token_ids[start : start + size]).tobytes())
        pieces.append(Piece(f"kv:prefix:sha256:{so_far.hexdigest()}", start, start + size))
    return pieces


# --- blocks ----------------------------------------------------------------------------------------------------


class BlockLayout(ABC):
    """How an attention backend keeps keys and values in its blocks, `(blocks, kv_heads, block_size, 2 * head_dim)`."""

    backend: ClassVar[str]

    @abstractmethod
    def read(self, cache: torch.Tensor, block_ids: torch.Tensor) -> LayerKV:
        """The keys and values of whole blocks, `(1, kv_heads, blocks * block_size, head_dim)` each."""

    @abstractmethod
    def write(self, cache: torch.Tensor, block_ids: torch.Tensor, kv: LayerKV) -> None:
        """Write the keys and values of whole blocks, as `read` gives them."""


class FlashAttentionLayout(BlockLayout):
    """Each token's key and value side by side."""

    backend = "FLASH_ATTN"

    def read(self, cache: torch.Tensor, block_ids: torch.Tensor) -> LayerKV:
        """See `BlockLayout.read`."""
        blocks = cache[block_ids.to(cache.device)].transpose(0, 1)
        keys, values = blocks.reshape(1, blocks.shape[0], -1, blocks.shape[-1]).chunk(2, dim=-1)
        return keys, values

    def write(self, cache: torch.Tensor, block_ids: torch.Tensor, kv: LayerKV) -> None:
        """See `BlockLayout.write`."""
        rows = torch.cat(kv, dim=-1)[0].to(cache.device, cache.dtype)
        blocks = rows.reshape(rows.shape[0], len(block_ids), -1, rows.shape[-1])
        cache[block_ids.to(cache.device)] = blocks.transpose(0, 1)


class CPUAttentionLayout(BlockLayout):
    """Keys in the first half of a block and values in the second, each in an order of the processor's.

    AVX-512 wants the keys of a block transposed, AMX and NEON want other orders. The order is measured: numbered keys
    and values are put through the server's own writer, and it is noted where each number came to lie.

    Args:
        put: writes keys and values, `(block_size, 1, head_dim)` each, into a block `(1, 1, block_size, 2 * head_dim)`.
        block_size: tokens of a block.
        head_dim: of a key, and of a value.
        dtype: of the cache.

    Raises:
        UnsupportedModelError: a key or a value does not come to lie in its block once.
    """

    backend = "CPU_ATTN"

    def __init__(
        self,
        put: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        size = block_size * head_dim
        numbers, lay = torch.arange(1, 2 * size + 1), torch.zeros(2 * size, dtype=torch.long)
        for shift in (0, 7, 14, 21):  # digits that bfloat16 holds exactly
            digits = ((numbers >> shift) & 127).to(dtype)
            block = torch.zeros(1, 1, block_size, 2 * head_dim, dtype=dtype)
            put(digits[:size].view(block_size, 1, head_dim), digits[size:].view(block_size, 1, head_dim), block)
            lay += block.flatten().long() << shift
        if not torch.equal(lay.sort().values, numbers):
            raise UnsupportedModelError(
                f"the server's CPU attention does not keep its keys and values ({dtype}, blocks of {block_size}, heads "
                f"of {head_dim}) one by one in their block, so they cannot be loaded. Use another --block-size."
            )
        self._comes_from = lay - 1
        self._goes_to = self._comes_from.argsort()

    def read(self, cache: torch.Tensor, block_ids: torch.Tensor) -> LayerKV:
        """See `BlockLayout.read`."""
        _, heads, size, both = cache.shape
        flat = cache[block_ids].reshape(len(block_ids), heads, size * both)[..., self._goes_to]
        keys, values = flat.view(len(block_ids), heads, 2, size, both // 2).permute(2, 1, 0, 3, 4)
        return keys.reshape(1, heads, -1, both // 2), values.reshape(1, heads, -1, both // 2)

    def write(self, cache: torch.Tensor, block_ids: torch.Tensor, kv: LayerKV) -> None:
        """See `BlockLayout.write`."""
        _, heads, size, both = cache.shape
        halves = torch.stack([each[0].to(cache.dtype).view(heads, len(block_ids), -1) for each in kv], dim=2)
        flat = halves.transpose(0, 1).reshape(len(block_ids), heads, size * both)[..., self._comes_from]
        cache[block_ids] = flat.view(len(block_ids), heads, size, both)


# --- what is learned of a model --------------------------------------------------------------------------------

_TOLERANCE = {torch.float32: 1e-3}
_MOST_DRIFT = 0.7


@dataclass(frozen=True, slots=True)
class Learned:
    """How a server's model rotates its keys, layer by layer, and what its documents usually drift by."""

    rotated: list[Rotation]
    drift: UsualDrift

    @classmethod
    def between(
        cls,
        candidates: Sequence[Rotation],
        alone: Sequence[LayerKV],
        alone_at: torch.Tensor,
        together: Sequence[LayerKV],
        together_at: torch.Tensor,
    ) -> Learned:
        """From the same tokens behind the instruction alone, and behind other documents too: see `UsualDrift`.

        The first layer's keys depend on nothing but token and position, so a rotation that moves them is the model's.
        In the other layers, they also drift.

        Raises:
            UnsupportedModelError: no candidate moves the keys.
        """
        found = []
        for index, (old, new) in enumerate(zip(alone, together, strict=True)):
            errors = {rotation: _moved_error([rotation], old, new, alone_at, together_at) for rotation in candidates}
            best = min(errors, key=errors.__getitem__)
            if errors[best] > (_MOST_DRIFT if index else _TOLERANCE.get(old[0].dtype, 0.1)):
                raise UnsupportedModelError(
                    f"the keys of layer {index} cannot be moved to another position: moved ones are off by "
                    f"{errors[best]:.0%}. The server merges nothing with this model; exact prefixes are kept."
                )
            found.append(best)
        return cls(found, UsualDrift.between(found, alone, alone_at, together, together_at))

    def to_item(self, id: str, candidates: Sequence[Rotation], fingerprint: ModelFingerprint) -> KVCacheItem:
        """As an item of one token."""
        halves = (layer.chunk(2, dim=-1) for layer in self.drift.layers)
        layers = [(keys[None, :, None].contiguous(), values[None, :, None].contiguous()) for keys, values in halves]
        return KVCacheItem(
            id=id,
            memory=cache_of(layers),
            token_ids=torch.tensor([0]),
            metadata={"rotations": [candidates.index(each) for each in self.rotated]},
            fingerprint=fingerprint,
        )

    @classmethod
    def of_item(cls, item: KVCacheItem, candidates: Sequence[Rotation]) -> Learned:
        """What `to_item` made."""
        drift = [torch.cat(kv, dim=-1)[0, :, 0].float() for kv in layers_of(item.memory)]
        return cls([candidates[index] for index in item.metadata["rotations"]], UsualDrift(drift))


def candidates_of(frequencies: torch.Tensor, *, interleaved: bool) -> list[Rotation]:
    """How a layer may rotate: not at all, or with these frequencies `(rotary_dim / 2,)`, as the server's model says."""
    module = torch.nn.Module()
    module.register_buffer("inv_freq", frequencies.float())
    return [UNROTATED, Rotation(module, "inv_freq", interleaved)]


def _moved_error(
    rotated: Sequence[Rotation], old: LayerKV, new: LayerKV, start: torch.Tensor, end: torch.Tensor
) -> float:
    """The relative error of the median token's key."""
    [(keys, values)] = contiguous_copy([old])
    PositionShift(rotated, start, end).turn(0, (keys, values))
    off, size = ((each.float().square().sum(dim=(0, 1, 3))) for each in (keys - new[0], new[0]))
    return float((off / size).sqrt().median())


def placed(
    pieces: Sequence[Piece],
    token_ids: Sequence[int],
    start: int,
    stop: int,
    get: Callable[[str], KVCacheItem | None],
    fingerprint: ModelFingerprint,
    learned: Callable[[], Learned],
) -> Iterator[tuple[int, int, Layers]]:
    """Loaded pieces, moved to where they stand in a prompt, as far as they lie in `start` to `stop`.

    Args:
        pieces: in the order in which they stand in the prompt.
        token_ids: the prompt.
        start: the first token that is wanted.
        stop: the token after the last one.
        get: reads an item from the store.
        fingerprint: of the server's model.
        learned: of this model; asked for where a piece is not exact.

    Yields:
        The first token, the one after the last, and keys and values `(1, kv_heads, tokens, head_dim)` a layer.

    Raises:
        StoreError: the store failed.
        CacheMismatchError: an item is missing, or holds other tokens, or another model made it.
    """
    for piece in pieces:
        first, last = max(piece.start, start), min(piece.stop, stop)
        if first >= last:
            continue
        item = get(piece.id)
        if item is None or item.fingerprint is None or not fingerprint.matches(item.fingerprint):
            raise TokenMismatchError(f"{piece.id} is not in the store, or another model made it")
        if item.token_ids.tolist()[: piece.stop - piece.start] != list(token_ids[piece.start : piece.stop]):
            raise TokenMismatchError(f"{piece.id} holds other tokens than the prompt")
        layers = cut(layers_of(item.memory), first - piece.start, last - piece.start)
        is_prefix = piece.id.startswith("kv:prefix:")  # whose id says all that stands before it
        if not is_prefix and item.prefix_digest != ids_digest(token_ids[: piece.start]):
            layers, known = contiguous_copy(layers), learned()
            stood = item.base_position + torch.arange(first - piece.start, last - piece.start)
            move = PositionShift(known.rotated, stood, torch.arange(first, last))
            for index, kv in enumerate(layers):
                move.turn(index, kv)
            known.drift.give(known.rotated, layers, first)
        yield first, last, layers
