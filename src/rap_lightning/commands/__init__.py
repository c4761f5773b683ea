"""Commands beside the trainer's: typed functions that become command lines."""
