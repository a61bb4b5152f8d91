"""Choosing and training for a quantized file: each layer's noise, the search for a budget, fine-tuning."""
