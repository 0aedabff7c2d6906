"""Texts and the caches made from them, kept, changed, moved and asked as one."""
