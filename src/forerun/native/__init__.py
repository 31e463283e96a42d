"""The native CPU kernels (kernels/ in the source tree) behind ctypes, sorted by what is bound."""
