"""The ops in plain PyTorch: same names and signatures as ``mor_ext.ops``, written to be read."""
