"""Benchmarks: cloudckpt beside its peers, on the same machine, in the same run. Start with `run.py`."""
