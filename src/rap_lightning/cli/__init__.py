"""The command line: entry point, help, error messages."""
