"""The embedded model, a corpus that is part of Python, and a demonstration with both."""
