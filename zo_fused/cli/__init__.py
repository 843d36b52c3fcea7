"""The command ``zo-fused``."""
