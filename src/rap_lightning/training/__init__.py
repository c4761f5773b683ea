"""The training run around one optimizer step: its state, its log, its checks."""
