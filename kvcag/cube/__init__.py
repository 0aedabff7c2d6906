"""MemoryCube: texts and the caches made from them, as one memory."""
