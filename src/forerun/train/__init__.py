"""Training on a small machine: the corpus, the tokenizer, the loop and its objectives."""
