"""Optimizers. Import them from `zo_fused` itself."""
