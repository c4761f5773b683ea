"""The study of docs/study: the paper's claims in the embedded world. `python -m benchmarks.study` repeats it."""
