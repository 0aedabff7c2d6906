"""The embedded model, a corpus that is part of Python, and the demonstration of both."""
