"""Any other Hugging Face causal LM behind the seam of `nn/network.py`.

Nothing is patched. transformers lets a caller bring a cache, a 4-D mask (or one per layer type) and explicit positions,
and that is all a tree needs. Whether a model really honours the three is not taken on trust: before it is handed out it
rehearses (`rehearsal.py`).
"""
