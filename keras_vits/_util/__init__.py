"""What the rest rests on: files, processes, progress. Nothing here knows a model."""
