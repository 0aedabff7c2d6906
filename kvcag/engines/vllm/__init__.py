"""The engine over a vLLM server."""
