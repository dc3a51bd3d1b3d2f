"""Training under DeepSpeed: the only layer that imports it."""
