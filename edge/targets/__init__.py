"""The formats that a model is written in, one package each."""
