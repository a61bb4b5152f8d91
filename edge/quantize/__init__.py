"""What quantization is for every target: recipes, calibration images, and the numerics of rounding."""
