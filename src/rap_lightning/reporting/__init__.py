"""One HTML page that compares runs. No torch, no Lightning; page.py says in which order to read."""
