"""The benchmark: `python -m tests.bench [ROW ...]`. The only place where speed is measured."""
