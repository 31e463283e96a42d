"""Networks: our transformer, foreign models behind the same seam, and the operations both are made of."""
