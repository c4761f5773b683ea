"""On-policy data and the benchmarks people quote: sample, score, train again, evaluate."""
