"""Fused operations of a training step, one file a subject, each beside its twin in plain torch.

A twin has the same signature as its kernel. Tests compare the two in float64; readers start from
the twin.
"""
