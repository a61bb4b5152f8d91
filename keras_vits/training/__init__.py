"""Training: data sets and the fit loop of the command line."""
