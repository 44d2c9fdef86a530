"""Benchmarks: the harness, one file a question, and the results with their receipts."""
