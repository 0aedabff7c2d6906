"""Operations on cache tensors: cut, merge, recompute, reuse. Knows nothing of prompts, stores or frameworks."""
