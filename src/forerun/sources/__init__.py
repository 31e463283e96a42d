"""Where a model comes from: its folder, its config, its tensors, its tokenizer, its ends, its fingerprint."""
