"""Microbenchmarks of the operations: ``python -m haste_ext.bench --help``."""
