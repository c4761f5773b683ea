"""The study of docs/study: the paper's claims, measured in the embedded world. `python -m benchmarks.study` repeats it."""
