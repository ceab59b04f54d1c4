"""Measurements that claims rest on.  ``python -m benchmarks NAME``; see ``docs/benchmarks.md``."""
