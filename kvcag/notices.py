"""What is said where a cache could not be used. The answer is right all the same: it comes later."""

from __future__ import annotations

import warnings
from itertools import islice

from kvcag.fingerprint import ModelFingerprint
from kvcag.stores.base import KVStore

_SAMPLE = 8


class CacheWarning(UserWarning):
    """A cache could not be used, and its text was encoded again. The answer is right; it came later."""


def warn_if_foreign(store: KVStore, fingerprint: ModelFingerprint) -> None:
    """Warn if what a store holds was made by another model: it will stay as it is and not be used.

    Looks at a few items, and is silent where one of them fits: models may share a store.
    """
    manifests = (store.manifest(key) for key in islice(store.keys(), _SAMPLE))
    made_by = [manifest.fingerprint for manifest in manifests if manifest and manifest.fingerprint]
    if made_by and not any(fingerprint.matches(other) for other in made_by):
        warnings.warn(
            f"the store's items were made by another model ({'; '.join(fingerprint.differences(made_by[0]))}). They "
            "stay as they are and are not used. Give each model a store of its own, or load the model that made them.",
            CacheWarning,
            stacklevel=3,
        )
