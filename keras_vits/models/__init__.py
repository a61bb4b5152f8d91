"""One family, one file. Every module here is imported by the registry; a new family is a new file."""
