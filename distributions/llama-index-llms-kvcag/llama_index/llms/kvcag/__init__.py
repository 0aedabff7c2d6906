"""kvcag under the name that LlamaIndex's integrations have."""

from kvcag.llama_index import *  # noqa: F403
from kvcag.llama_index import __all__ as __all__
