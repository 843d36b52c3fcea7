"""Triton kernels of zo_fused. Nothing is imported or registered here."""
