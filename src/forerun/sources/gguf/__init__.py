"""Models in GGUF files: the head of a file, the architecture and the tokenizer that it describes, its tensors."""
