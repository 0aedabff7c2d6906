"""Every error that kvcag raises on purpose, in one tree.

```
KVCAGError
├── InvalidInputError (ValueError)          a wrong argument
│   └── EmptyPromptError                    nothing to encode
├── PromptError                             this model cannot take this prompt
│   ├── ContextLengthError                  prompt + max_new_tokens exceed the model's context
│   │   └── CorpusLengthError               … because of the texts that a cube put into it
│   ├── ChatTemplateError                   the chat template cannot render these messages
│   ├── UnsupportedContentError             images, audio, … in a message
│   └── ConstraintError                     a schema, regex or grammar that cannot be used
│       └── ConstraintBudgetError           its shortest completion does not fit max_new_tokens
├── CacheMismatchError (ValueError)         a cache does not fit the model or the prompt
│   ├── FingerprintMismatchError            … another model, dtype, adapter or template
│   └── TokenMismatchError                  … other token ids
├── UnsupportedModelError                   this model's cache cannot be reused or merged
├── UnknownItemError (LookupError)          no item with these ids
├── StoreError                              a store failed
│   ├── CorruptItemError                    an item was cut, changed or half written
│   ├── FormatError                         not a file of kvcag, or of a newer version
│   │   └── UnsafePickleError               a pickle calls something that no cache needs
│   ├── StoreFullError                      an item is larger than the store's budget
│   ├── StoreUnavailableError (OSError)     disk full, permission denied, remote unreachable
│   └── SchedulerStateError                 a scheduler's database is damaged, locked or not one
├── EngineError                             the model, or the server that runs it, failed
│   ├── DeviceMemoryError                   the device is out of memory
│   ├── ServerError                         the server refused a request, or failed while it handled one
│   ├── ServerUnavailableError (ConnectionError)  down, restarting, overloaded, or disconnected during an answer
│   └── ServerTimeoutError (TimeoutError)   the server took too long to respond
├── ModelFetchError                         the embedded model could not be fetched or converted
└── MissingExtraError (ImportError)         an optional dependency is not installed

CacheWarning (UserWarning)                  a cache could not be used; the answer is right, but took longer
└── ServerWarning                           a server lacks a feature, or dropped a preloaded prompt
```

Each message says what was wrong and what to do about it. Where a built-in exception fits, the class also derives from
it, so that `except ValueError` works. `PromptError` is not a `ValueError`, because LlamaIndex swallows those.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from os import PathLike


class KVCAGError(Exception):
    """The base class: `except KVCAGError` catches every error that kvcag raises on purpose."""


class InvalidInputError(KVCAGError, ValueError):
    """An argument is wrong. Raised before any work is done."""


class EmptyPromptError(InvalidInputError):
    """There is nothing to encode."""


class PromptError(KVCAGError):
    """The model cannot take this prompt. Raised before any work is done.

    Not a ValueError: LlamaIndex's `Refine` catches those, and answers "Empty Response".
    """


class ContextLengthError(PromptError):
    """The prompt and the tokens to generate do not fit into the model's context.

    Attributes:
        prompt_tokens: the length of the whole prompt, including cached tokens.
        max_new_tokens: the number of tokens to generate.
        limit: the model's context length.
        excess: by how many tokens prompt and answer exceed the limit.
    """

    def __init__(self, prompt_tokens: int, max_new_tokens: int, limit: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.limit = limit
        self.excess = prompt_tokens + max_new_tokens - limit
        super().__init__(
            f"the prompt has {prompt_tokens} tokens; with max_new_tokens={max_new_tokens}, that is {self.excess} more "
            f"than the model's context of {limit}. Pass fewer documents, or lower max_new_tokens."
        )


class CorpusLengthError(ContextLengthError):
    """The texts that a cube puts into the prompt do not fit into the model's context.

    Attributes:
        texts: the number of these texts.
    """

    def __init__(self, texts: int, found: bool, error: ContextLengthError) -> None:
        super().__init__(error.prompt_tokens, error.max_new_tokens, error.limit)
        self.texts = texts
        what, advice = (
            (f"the {texts} texts that were found", "Ask for fewer: a smaller k.")
            if found
            else (
                f"all {texts} texts of the cube",
                "Give the cube searchable texts (texts=…, such as kvcag.langchain.VectorStoreTexts or "
                "kvcag.llama_index.IndexTexts), or divide the texts among several cubes.",
            )
        )
        self.args = (
            f"{what} make a prompt of {self.prompt_tokens} tokens; with max_new_tokens={self.max_new_tokens} that is "
            f"{self.excess} more than the model's context of {self.limit}. {advice}",
        )


class ChatTemplateError(PromptError):
    """The tokenizer's chat template cannot render these messages."""


class UnsupportedContentError(PromptError):
    """A message has content that a text model cannot read, such as an image."""


class ConstraintError(PromptError):
    """A schema, regex, list of choices or grammar is invalid, or cannot be enforced with this model."""


class ConstraintBudgetError(ConstraintError):
    """No output that satisfies the constraint fits into the token budget.

    Attributes:
        needed_tokens: the length of the shortest valid output.
        max_new_tokens: the token budget.
    """

    def __init__(self, needed_tokens: int, max_new_tokens: int) -> None:
        self.needed_tokens = needed_tokens
        self.max_new_tokens = max_new_tokens
        super().__init__(
            f"the shortest output that satisfies the constraint needs {needed_tokens} tokens, and max_new_tokens is "
            f"{max_new_tokens}. Raise max_new_tokens to at least {needed_tokens}."
        )


class CacheMismatchError(KVCAGError, ValueError):
    """A cache does not fit the model or the prompt that it was used with."""


class FingerprintMismatchError(CacheMismatchError):
    """A cache was used with another model than the one that produced it.

    Attributes:
        differences: one line for each part of the fingerprint that differs.
    """

    def __init__(self, what: str, differences: Iterable[str]) -> None:
        self.differences = list(differences)
        super().__init__(
            f"{what} was made by another model: {'; '.join(self.differences)}. "
            "Load the model that made it, or encode the text again with this one."
        )


class TokenMismatchError(CacheMismatchError):
    """A cache's tokens differ from its own record of them, or from the beginning of the prompt."""


class UnsupportedModelError(KVCAGError):
    """The model's cache cannot be reused, cut or merged, or the engine does not support an operation."""


class UnknownItemError(KVCAGError, LookupError):
    """No item with these ids is in the memory.

    Attributes:
        ids: the ids that were not found.
    """

    def __init__(
        self, ids: Iterable[str], advice: str = "Add it first, or pass skip_missing=True to leave it out."
    ) -> None:
        self.ids = list(ids)
        super().__init__(f"no item with id {', '.join(map(repr, self.ids))} is in the memory. {advice}")


class StoreError(KVCAGError):
    """A store failed."""


class CorruptItemError(StoreError):
    """A stored item was cut, changed or only half written.

    Attributes:
        path: the damaged file, or the item's key.
    """

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        self.path = str(path)
        super().__init__(f"{self.path} is damaged: {reason}. Delete it and encode its text again.")


class FormatError(StoreError):
    """A file was not written by kvcag, or has a version that this release cannot read."""


class UnsafePickleError(FormatError):
    """A pickle calls a function that no dump of caches needs. The pickle was not run."""


class StoreFullError(StoreError):
    """An item does not fit into a store's budget, even after every unpinned item is evicted.

    Attributes:
        item_id: the item's id.
        needed, max_bytes, pinned: bytes of the item, of the budget, and of the pinned items.
    """

    def __init__(self, item_id: str, needed: int, max_bytes: int, pinned: int = 0) -> None:
        self.item_id, self.needed, self.max_bytes, self.pinned = item_id, needed, max_bytes, pinned
        super().__init__(
            f"item {item_id!r} takes {needed} bytes, but the store has max_bytes={max_bytes}, of which {pinned} are "
            "pinned. Raise max_bytes, unpin items, or split the text."
        )


class StoreUnavailableError(StoreError, OSError):
    """The disk is full, permission was denied, or a remote did not answer. Stored items are not lost."""


class SchedulerStateError(StoreError):
    """The database of a `CacheScheduler` is damaged, in use by another scheduler, or of another program.

    Attributes:
        path: the database file.
    """

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        self.path = str(path)
        super().__init__(f"the scheduler's state {self.path} {reason}")


class EngineError(KVCAGError):
    """The model, or the server that runs it, failed while it encoded or generated."""


class DeviceMemoryError(EngineError):
    """The device has too little memory for the keys and values of this prompt. Stored items are not lost."""


class ServerError(EngineError):
    """A server refused a request, or failed while it handled one.

    Attributes:
        status: the HTTP status.
        detail: the server's error message.
    """

    def __init__(self, what: str, status: int, detail: str) -> None:
        self.status, self.detail = status, detail
        super().__init__(f"{what} answered {status}: {detail}")


class ServerUnavailableError(EngineError, ConnectionError):
    """A server cannot be reached, is starting or overloaded, or disconnected during an answer.

    Attributes:
        retry_after: the seconds to wait before a retry, as the server says; 0 if it says nothing.
    """

    retry_after = 0.0


class ServerTimeoutError(EngineError, TimeoutError):
    """Timed out waiting for a server's response."""


class ModelFetchError(KVCAGError):
    """The embedded model could not be fetched, checked or converted."""


class MissingExtraError(KVCAGError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: pip install 'kvcag[{extra}]'")


class CacheWarning(UserWarning):
    """A cache could not be used, and its text was encoded again. The answer is right, but took longer."""


class ServerWarning(CacheWarning):
    """A server lacks a feature, or dropped a preloaded prompt. The message says what the answer lacks."""


class WarnOnce(set[str]):
    """Warns once per message, or once per subject that several messages share. The set has what was warned about."""

    def once(self, message: str, category: type[Warning] = ServerWarning, about: str = "") -> None:
        """Warn, unless a warning with this message, or about the same subject, was given before."""
        if (about or message) not in self:
            self.add(about or message)
            warnings.warn(message, category, stacklevel=4)
