"""`python -m keras_vits.cli` is the `keras-vits` command."""

from keras_vits.cli import main

main()
