"""An engine whose model runs in a server, which keeps keys and values itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from kvcag.context import ContextPrompt
from kvcag.engines.base import Usage
from kvcag.engines.generating import Generating
from kvcag.fingerprint import ModelFingerprint
from kvcag.prompt import Prompt


class Serving(Generating):
    """What `KVCacheMemory` needs of a server: that it can be sent prompts ahead of the questions."""

    @property
    @abstractmethod
    def fingerprint(self) -> ModelFingerprint:
        """Which model this is."""

    @abstractmethod
    def preload(self, prompt: Prompt | ContextPrompt, *, tenant: str = "") -> Usage:
        """Have the server encode a prompt, so that what begins with it is answered sooner."""

    @abstractmethod
    def preloaded(self, token_ids: Sequence[int], *, tenant: str = "") -> int:
        """How many tokens at the beginning of these were sent ahead."""

    @abstractmethod
    def forget(self, tenant: str = "") -> None:
        """Send nothing of a tenant's ahead again."""

    @abstractmethod
    def prompt_of(self, token_ids: Sequence[int], messages: list[dict[str, Any]] | None = None) -> ContextPrompt:
        """Tokens as the text of a prompt that knows them."""
