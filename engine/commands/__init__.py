"""The command lines behind `python -m engine.<name>`; each parses, calls the library and prints."""
