"""What networks run on: plain torch, and the native kernels."""
