"""Tensors only: caches cut, merged, recomputed and kept. Knows no prompts, stores or frameworks."""
