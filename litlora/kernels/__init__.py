"""Fused operations of a training step, one file a subject, each beside the plain torch code that it
stands for.

A twin has the same signature as its kernel; tests compare the two in float64, readers start from
the twin.
"""
