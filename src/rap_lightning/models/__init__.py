"""Language models: loading, response log-probabilities, references, export. No Lightning."""
