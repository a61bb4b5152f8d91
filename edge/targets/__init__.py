"""One package for each kind of file: export, quantize and load."""
