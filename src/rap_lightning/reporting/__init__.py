"""One HTML page that compares runs: what their folders hold, as pictures and words. No torch, no Lightning."""
