"""Adapter algebra: pure functions over tensors and opened checkpoints, one file a verb."""
