"""The benchmark of the whole system: `python -m bench --help`, docs/benchmarks.md."""
