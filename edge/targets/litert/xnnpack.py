"""What XNNPACK, which runs a file on the CPU, refuses or does slowly: numbers that decide how a file is written."""

FEW_CHANNELS = 4  # of an image: less than the 8 that XNNPACK pads each pixel to in int8
FEW_WEIGHTS, MANY_ROWS = 1024, 1024  # of a layer that is faster in float than with ranges found for each row
RESCALED = 128  # scale of input times weight over that of the output: XNNPACK refuses 256, and its refusal may crash
JOINED = 5  # tensors that one concatenation may have
