"""The native kernels as a backend: packed transformers and packed draft heads."""
