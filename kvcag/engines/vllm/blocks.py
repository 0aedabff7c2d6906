"""The parts of the vLLM connector that do not need vLLM: fields of requests, ids of pieces, block layouts, moving."""

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
"""The field of `kv_transfer_params` for kvcag's connector."""

# --- fields of a request ---------------------------------------------------------------------------------------

_MERGED = "kvcag-merged."
_Edge: TypeAlias = Annotated[int, Field(strict=True, ge=0)]
Span: TypeAlias = tuple[_Edge, _Edge]


class Asked(BaseModel):
    """The fields of `kv_transfer_params["kvcag"]` in a request. A span is `[start, stop)`, in tokens of the prompt.

    Attributes:
        merge: spans of the instruction and of each document, adjacent and from 0 on. The connector loads them from the
            store, moves them to their positions, and writes them into the server's blocks. The salt must be
            `merged_salt`.
        endings: for each span of `merge`, the tokens that the stored document has after the span's tokens, but this
            prompt does not. Empty if no document has any.
        keep: spans to store as documents, with the keys and values that this prompt computes.
        learn: spans of passages from which the connector learns the rotation of keys and the usual drift. They are
            adjacent in this prompt, and each was stored before, encoded after the tokens before the first passage.
        has: ids of items; the response names those that are missing.
        forget: delete the namespace from the store.
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
        """Read the fields of a request for a prompt of `tokens` tokens; None if it has none for the connector.

        Raises:
            InvalidInputError: a field cannot be read, or a span is empty, out of order, or not within the prompt.
        """
        if not params or params.get(FIELD) is None:
            return None
        try:
            asked = cls.model_validate(params[FIELD])
        except ValidationError as error:
            raise InvalidInputError(f"kv_transfer_params[{FIELD!r}] cannot be read: {error}") from None
        if any(spans and spans[-1][1] > tokens for spans in (asked.merge, asked.keep, asked.learn)):
            raise InvalidInputError(
                f"a span of kv_transfer_params[{FIELD!r}] ends after the end of the prompt of {tokens} tokens"
            )
        return asked

    @model_validator(mode="after")
    def _check_spans(self) -> Self:
        for spans in (self.merge, self.keep, self.learn):
            edges = [edge for span in spans for edge in span]
            if any(start >= stop for start, stop in spans) or edges != sorted(edges):
                raise ValueError("spans must not be empty, and must be in order")
        stops = [0, *(stop for _, stop in self.merge)]
        if any(start != before for (start, _), before in zip(self.merge, stops, strict=False)):
            raise ValueError("the spans of merge must be adjacent, from 0 on")
        if self.endings and len(self.endings) != len(self.merge):
            raise ValueError("there must be an ending for each span of merge, or none")
        return self


def merged_salt(context_ids: Sequence[int], salt: str | None) -> str:
    """Return the salt of a request that merges, so that only requests for the same context reuse its blocks.

    A server assumes that equal tokens under equal salts have equal keys and values. Merged ones are approximate, so
    they get a salt of their own.

    Args:
        context_ids: the tokens of instruction and documents.
        salt: the salt of the namespace.
    """
    digest = base64.urlsafe_b64encode(bytes.fromhex(ids_digest(context_ids))).decode().rstrip("=")
    return f"{_MERGED}{digest}.{salt or ''}"


def space_of(salt: str | None) -> tuple[str, bool]:
    """Return the salt of the namespace, and whether `salt` is a `merged_salt`."""
    if salt is None or not salt.startswith(_MERGED):
        return salt or "", False
    return salt.removeprefix(_MERGED).partition(".")[2], True


@dataclass(frozen=True, slots=True)
class Piece:
    """The id of an item, and the tokens `start` to `stop` of a prompt, with which the item begins."""

    id: str
    start: int
    stop: int


def prefix_pieces(model_digest: str, token_ids: Sequence[int], size: int) -> list[Piece]:
    """Divide the beginning of a prompt into pieces of `size` tokens. Each id depends on all tokens up to its end."""
    so_far, pieces = hashlib.sha256(model_digest.encode()), []
    for start in range(0, len(token_ids) - size + 1, size):
        so_far.update(array("I", token_ids[start : start + size]).tobytes())
        pieces.append(Piece(f"kv:prefix:sha256:{so_far.hexdigest()}", start, start + size))
    return pieces


# --- blocks ----------------------------------------------------------------------------------------------------


class BlockLayout(ABC):
    """The layout of an attention backend's blocks, `(blocks, kv_heads, block_size, 2 * head_dim)`."""

    backend: ClassVar[str]

    @abstractmethod
    def read(self, cache: torch.Tensor, block_ids: torch.Tensor) -> LayerKV:
        """Return the keys and values of whole blocks, `(1, kv_heads, blocks * block_size, head_dim)` each."""

    @abstractmethod
    def write(self, cache: torch.Tensor, block_ids: torch.Tensor, kv: LayerKV) -> None:
        """Write the keys and values of whole blocks, in the shape that `read` returns."""


class FlashAttentionLayout(BlockLayout):
    """The layout of FlashAttention: each token's key, then its value."""

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
    """The layout of vLLM's CPU attention: the keys of a block, then its values, in an order that depends on the CPU.

    With AVX-512, the keys of a block are transposed; AMX and NEON have other orders. The order is measured: the
    server's own function writes numbered keys and values, and the place of each number is recorded.

    Args:
        put: writes keys and values, `(block_size, 1, head_dim)` each, into a block `(1, 1, block_size, 2 * head_dim)`.
        block_size: the number of tokens in a block.
        head_dim: numbers per key, and per value.
        dtype: the cache's dtype.

    Raises:
        UnsupportedModelError: a number is not in the block exactly once.
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
        for shift in (0, 7, 14, 21):  # 7-bit digits, which bfloat16 represents exactly
            digits = ((numbers >> shift) & 127).to(dtype)
            block = torch.zeros(1, 1, block_size, 2 * head_dim, dtype=dtype)
            put(digits[:size].view(block_size, 1, head_dim), digits[size:].view(block_size, 1, head_dim), block)
            lay += block.flatten().long() << shift
        if not torch.equal(lay.sort().values, numbers):
            raise UnsupportedModelError(
                f"the server's CPU attention does not store each number of its keys and values ({dtype}, blocks of "
                f"{block_size}, heads of {head_dim}) once in their block, so blocks cannot be loaded. Use another "
                "--block-size."
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


# --- the rotation and the usual drift of a model ---------------------------------------------------------------

_TOLERANCE = {torch.float32: 1e-3}
_MOST_DRIFT = 0.7


@dataclass(frozen=True, slots=True)
class Learned:
    """The rotation of each layer of a server's model, and the usual drift of documents."""

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
        """Learn from two encodings of the same tokens: after the instruction only, and after other documents too.

        The first layer's keys depend only on token and position, so the rotation that maps one encoding onto the other
        is exact there. In the other layers, the keys also drift.

        Args:
            candidates: the possible rotations.
            alone: as for `UsualDrift.between`; so are the other arguments.
            alone_at: the positions of `alone`.
            together: keys and values of the second encoding.
            together_at: the positions of `together`.

        Raises:
            UnsupportedModelError: no candidate fits.
        """
        found = []
        for index, (old, new) in enumerate(zip(alone, together, strict=True)):
            errors = {rotation: _moved_error([rotation], old, new, alone_at, together_at) for rotation in candidates}
            best = min(errors, key=errors.__getitem__)
            if errors[best] > (_MOST_DRIFT if index else _TOLERANCE.get(old[0].dtype, 0.1)):
                raise UnsupportedModelError(
                    f"the keys of layer {index} cannot be moved to another position: moved keys are off by "
                    f"{errors[best]:.0%}. The server does not merge with this model, and reuses exact prefixes."
                )
            found.append(best)
        return cls(found, UsualDrift.between(found, alone, alone_at, together, together_at))

    def to_item(self, id: str, candidates: Sequence[Rotation], fingerprint: ModelFingerprint) -> KVCacheItem:
        """Convert to an item of one token, for the store."""
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
        """Convert the result of `to_item` back."""
        drift = [torch.cat(kv, dim=-1)[0, :, 0].float() for kv in layers_of(item.memory)]
        return cls([candidates[index] for index in item.metadata["rotations"]], UsualDrift(drift))


def candidates_of(frequencies: torch.Tensor, *, interleaved: bool) -> list[Rotation]:
    """Return the possible rotations of a layer: none, or with the model's frequencies, `(rotary_dim / 2,)`."""
    module = torch.nn.Module()
    module.register_buffer("inv_freq", frequencies.float())
    return [UNROTATED, Rotation(module, "inv_freq", interleaved)]


def _moved_error(
    rotated: Sequence[Rotation], old: LayerKV, new: LayerKV, start: torch.Tensor, end: torch.Tensor
) -> float:
    """Rotate keys from `start` to `end`, and return the relative error of the median token's key."""
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
    """Load pieces from the store and move them to their positions in a prompt, for the tokens `start` to `stop`.

    Args:
        pieces: the pieces, in the order of the prompt.
        token_ids: the tokens of the prompt.
        start: the first wanted token.
        stop: the end of the wanted tokens.
        get: reads an item from the store.
        fingerprint: the fingerprint of the server's model.
        learned: returns the model's rotations and usual drift. Called only if a piece is not exact.

    Yields:
        The first token, the end, and keys and values, `(1, kv_heads, tokens, head_dim)` per layer.

    Raises:
        StoreError: the store failed.
        CacheMismatchError: an item is missing, has other tokens, or was made by another model.
    """
    for piece in pieces:
        first, last = max(piece.start, start), min(piece.stop, stop)
        if first >= last:
            continue
        item = get(piece.id)
        if item is None or item.fingerprint is None or not fingerprint.matches(item.fingerprint):
            raise TokenMismatchError(f"{piece.id} is not in the store, or another model made it")
        if item.token_ids.tolist()[: piece.stop - piece.start] != list(token_ids[piece.start : piece.stop]):
            raise TokenMismatchError(f"{piece.id} has other tokens than the prompt")
        layers = cut(layers_of(item.memory), first - piece.start, last - piece.start)
        is_prefix = piece.id.startswith("kv:prefix:")  # its id depends on all tokens before it
        if not is_prefix and item.prefix_digest != ids_digest(token_ids[: piece.start]):
            layers, known = contiguous_copy(layers), learned()
            stood = item.base_position + torch.arange(first - piece.start, last - piece.start)
            move = PositionShift(known.rotated, stood, torch.arange(first, last))
            for index, kv in enumerate(layers):
                move.turn(index, kv)
            known.drift.give(known.rotated, layers, first)
        yield first, last, layers
