"""Every error that kvcag raises on purpose, in one tree.

```
KVCAGError
├── InvalidInputError (ValueError)          a wrong argument
│   └── EmptyPromptError                    nothing to encode
├── PromptError                             this model cannot take this prompt; no ValueError: LlamaIndex swallows those
│   ├── ContextLengthError                  prompt + max_new_tokens exceed the model's context
│   │   └── CorpusLengthError               … because of the texts that a cube put into it
│   ├── ChatTemplateError                   the chat template cannot render these messages
│   ├── UnsupportedContentError             images, audio, … in a message
│   └── ConstraintError                     a schema, regex or grammar that cannot be used
│       └── ConstraintBudgetError           its shortest completion does not fit max_new_tokens
├── CacheMismatchError (ValueError)         a cache was used with something it was not made for
│   ├── FingerprintMismatchError            … another model, dtype, adapter or template
│   └── TokenMismatchError                  … other token ids
├── UnsupportedModelError                   this model's cache cannot be reused or merged
├── UnknownItemError (LookupError)          no item with these ids
├── StoreError                              where items live
│   ├── CorruptItemError                    cut, flipped or half written
│   ├── FormatError                         not a file of ours, or of a newer version
│   │   └── UnsafePickleError               a pickle that calls something unknown
│   ├── StoreFullError                      larger than the store's budget
│   ├── StoreUnavailableError (OSError)     disk full, permission denied, remote gone
│   └── SchedulerStateError                 a scheduler's database is damaged, locked or not one
├── EngineError                             the model, or the server that runs it, failed
│   ├── DeviceMemoryError                   the device has no memory left
│   ├── ServerError                         the server refused a request, or failed at it
│   ├── ServerUnavailableError (ConnectionError)  down, restarting, overloaded, or gone while it answered
│   └── ServerTimeoutError (TimeoutError)   it took too long to respond
├── ModelFetchError                         the embedded model could not be fetched or converted
└── MissingExtraError (ImportError)         an optional dependency is not installed

CacheWarning (UserWarning)                  a cache could not be used; the answer is right and took longer
└── ServerWarning                           a server lacks something, or forgot a preloaded prompt
```

Each message says what was wrong and what to do about it. Where a built-in exception fits, the class is one too, so
that `except ValueError` goes on working.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from os import PathLike


class KVCAGError(Exception):
    """The root: `except KVCAGError` catches everything that kvcag raises on purpose."""


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
        prompt_tokens: tokens of the whole prompt, cached ones included.
        max_new_tokens: tokens that were asked for.
        limit: tokens that the model can attend to.
        excess: by how many tokens the two exceed the limit.
    """

    def __init__(self, prompt_tokens: int, max_new_tokens: int, limit: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.limit = limit
        self.excess = prompt_tokens + max_new_tokens - limit
        super().__init__(
            f"the prompt has {prompt_tokens} tokens; with max_new_tokens={max_new_tokens} that is {self.excess} more "
            f"than the model's context of {limit}. Pass fewer documents, or lower max_new_tokens."
        )


class CorpusLengthError(ContextLengthError):
    """The texts that a cube answers from do not fit into the model's context.

    Attributes:
        texts: how many there are.
    """

    def __init__(self, texts: int, found: bool, error: ContextLengthError) -> None:
        super().__init__(error.prompt_tokens, error.max_new_tokens, error.limit)
        self.texts = texts
        what, advice = (
            (f"the {texts} texts that were found", "Ask for fewer: a smaller k.")
            if found
            else (
                f"all {texts} texts of the cube",
                "Give the cube texts that can be searched (texts=…, such as kvcag.langchain.VectorStoreTexts or "
                "kvcag.llama_index.IndexTexts), or divide them among several cubes.",
            )
        )
        self.args = (
            f"{what} make a prompt of {self.prompt_tokens} tokens; with max_new_tokens={self.max_new_tokens} that is "
            f"{self.excess} more than the model's context of {self.limit}. {advice}",
        )


class ChatTemplateError(PromptError):
    """The tokenizer's chat template cannot render these messages."""


class UnsupportedContentError(PromptError):
    """A message holds content that a text model cannot read."""


class ConstraintError(PromptError):
    """A schema, regex, list of choices or grammar that cannot constrain a generation."""


class ConstraintBudgetError(ConstraintError):
    """No output that satisfies the constraint fits into the token budget.

    Attributes:
        needed_tokens: tokens of the shortest valid completion.
        max_new_tokens: the budget it did not fit.
    """

    def __init__(self, needed_tokens: int, max_new_tokens: int) -> None:
        self.needed_tokens = needed_tokens
        self.max_new_tokens = max_new_tokens
        super().__init__(
            f"the shortest output that satisfies the constraint needs {needed_tokens} tokens, and max_new_tokens is "
            f"{max_new_tokens}. Raise max_new_tokens to at least {needed_tokens}."
        )


class CacheMismatchError(KVCAGError, ValueError):
    """A cache was used with something it was not made for."""


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
    """A cache holds other tokens than it says, or than the prompt begins with."""


class UnsupportedModelError(KVCAGError):
    """The model keeps a state that cannot be reused, cut or merged as keys and values can."""


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
    """The place where items live failed."""


class CorruptItemError(StoreError):
    """A stored item was cut, changed or only half written.

    Attributes:
        path: the file, or the store's key, that is damaged.
    """

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        self.path = str(path)
        super().__init__(f"{self.path} is damaged: {reason}. Delete it and encode its text again.")


class FormatError(StoreError):
    """Something that is not a file of ours, or of a version that this release cannot read."""


class UnsafePickleError(FormatError):
    """A pickle calls something that no dump of caches needs. It was not run."""


class StoreFullError(StoreError):
    """An item does not fit into a store's budget, however much else leaves.

    Attributes:
        item_id: which item.
        needed, max_bytes, pinned: bytes of the item, of the budget, and of what may not leave.
    """

    def __init__(self, item_id: str, needed: int, max_bytes: int, pinned: int = 0) -> None:
        self.item_id, self.needed, self.max_bytes, self.pinned = item_id, needed, max_bytes, pinned
        super().__init__(
            f"item {item_id!r} takes {needed} bytes, and the store has max_bytes={max_bytes} with {pinned} of them "
            "pinned. Raise max_bytes, unpin something, or split the text."
        )


class StoreUnavailableError(StoreError, OSError):
    """The disk is full, permission was denied, or a remote did not answer. Nothing that was kept is lost."""


class SchedulerStateError(StoreError):
    """The database of a `CacheScheduler` is damaged, in use by another scheduler, or not a scheduler's.

    Attributes:
        path: the database.
    """

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        self.path = str(path)
        super().__init__(f"the scheduler's state {self.path} {reason}")


class EngineError(KVCAGError):
    """The model, or the server that runs it, failed while it encoded or generated."""


class DeviceMemoryError(EngineError):
    """The device has too little memory for the keys and values of this prompt. Nothing that was kept is lost."""


class ServerError(EngineError):
    """A server refused a request, or failed at it.

    Attributes:
        status: the HTTP status.
        detail: what the server said.
    """

    def __init__(self, what: str, status: int, detail: str) -> None:
        self.status, self.detail = status, detail
        super().__init__(f"{what} answered {status}: {detail}")


class ServerUnavailableError(EngineError, ConnectionError):
    """A server cannot be reached, is starting or overloaded, or went away while it answered.

    Attributes:
        retry_after: seconds after which the server asked to be asked again; 0 where it did not say.
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
    """A cache could not be used, and its text was encoded again. The answer is right; it took longer."""


class ServerWarning(CacheWarning):
    """A server lacks something, or forgot a preloaded prompt: the message says what the answer does without."""


class WarnOnce(set[str]):
    """Warns once per message, or once about a thing that several messages are about; it holds what was warned about."""

    def once(self, message: str, category: type[Warning] = ServerWarning, about: str = "") -> None:
        """Warn, unless this message, or another one about the same thing, was given before."""
        if (about or message) not in self:
            self.add(about or message)
            warnings.warn(message, category, stacklevel=4)
