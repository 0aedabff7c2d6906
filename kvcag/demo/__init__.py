"""The embedded model, a corpus every Python carries, and the demonstration that runs on them."""
