"""Benchmarks. Each is a module of its own, run from the repository's root:
``python -m bench.cpu.overhead``."""
