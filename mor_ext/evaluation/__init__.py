"""What a model is worth, and what counting is worth on the same text."""
