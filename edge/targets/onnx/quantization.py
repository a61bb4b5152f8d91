def quantize(artifact, recipe, calibration=None, folder=None):
    pass
