"""Text only: scored pairs, goals, relabelling and rendering. Nothing here imports torch."""
