"""Evidence for a file: that it is the same model, how fast it is, where the time goes, and the report of it."""
