"""A model as a static graph: Keras model -> trace -> Graph of primitive operations -> rewrite; every target reads it.

ir holds the graph, ops the table of its operations, trace makes one from Keras, rewrite simplifies it exactly, macs
counts what it computes.
"""
