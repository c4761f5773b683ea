"""References: where reference log-probabilities come from."""
