"""Faster passes on an NVIDIA GPU. Its modules need Triton: `kvcag.engines.hf` imports them on CUDA alone."""
