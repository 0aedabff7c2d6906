"""Engines: models that encode text into caches and decode answers."""
