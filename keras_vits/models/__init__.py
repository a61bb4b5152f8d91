"""One family, one file: a new family is a new file here. Files with an underscore are what families share."""
