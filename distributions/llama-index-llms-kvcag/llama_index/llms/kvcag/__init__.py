"""kvcag in LlamaIndex: see `kvcag.llama_index`."""

from kvcag.llama_index import *  # noqa: F403
from kvcag.llama_index import __all__ as __all__
