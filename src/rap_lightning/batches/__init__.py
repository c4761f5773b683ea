"""Tensors, but no Lightning: token ids, layouts and the Batch they all become."""
