"""What makes a quantized .tflite file keep its answers: the float file is prepared before it is quantized.

    plan      which layer is quantized, and how
    observe   what the float file computes on the calibration images
    smooth    outlier channels go into the weights
    noise     what rounding adds to a layer's outputs, predicted
    ranges    what the bits of activations stand for; wider activations; SiLU in integers
    attention attention's products in integers
    weights   GPTQ rounding, bias correction
    prepare   all of them in order: `Preparation`
    ai_edge   the one place that talks to ai-edge-quantizer

ai-edge-quantizer writes the file. It is given a float file whose numbers are already right for it, and the ranges of
activations and weights: nothing is left for it to decide. Without calibration images it decides as it does by itself.
"""

# A scale costs a multiplication. It is put in where a layer's outputs have less signal than ENOUGH_DB over the noise
# that 8 bits add there and where it leaves at most the share WORTH of it, if all scales together leave at most that of
# the whole file's noise. Attention is computed in 8 bits where its outputs have as much, and a range leaves out values
# that were seen where that leaves at most this share of the whole file's noise.
ENOUGH_DB, WORTH = 35.0, 0.5
