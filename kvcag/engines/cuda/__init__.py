"""Faster passes on an NVIDIA GPU. The modules need Triton, so `kvcag.engines.hf` imports them only with CUDA."""
