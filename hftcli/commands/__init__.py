"""The commands, what each parses and prints."""
