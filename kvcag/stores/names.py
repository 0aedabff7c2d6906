"""Under which name an item is kept: a hash that two namespaces, or two servers with other salts, never share."""

from __future__ import annotations

import hmac

SUFFIX = ".safetensors"


class Names:
    """The names of one namespace.

    An id is often a hash of a text, and so tells whoever can guess the text that it is kept. Names are an HMAC-SHA256
    of it under a secret: without the salt they tell nothing, and equal ids of two namespaces have different names.

    Args:
        namespace: whose items these are.
        salt: a secret of the server's.

    Attributes:
        space: the namespace's own name, 32 hex digits.
    """

    def __init__(self, namespace: str = "", salt: bytes = b"") -> None:
        self._secret = hmac.digest(salt, namespace.encode(), "sha256")
        self.space = self._digest("namespace")[:32]

    def item(self, key: str) -> str:
        """The name of an item, 64 hex digits."""
        return self._digest(f"item {key}")

    def file(self, key: str) -> str:
        """The path of an item below its namespace: one of 256 directories, and a file in it."""
        name = self.item(key)
        return f"{name[:2]}/{name[2:]}{SUFFIX}"

    def _digest(self, text: str) -> str:
        return hmac.digest(self._secret, text.encode("utf-8", "surrogatepass"), "sha256").hex()
