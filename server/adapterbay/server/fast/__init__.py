"""A fused forward of a step for bases that are built like Llama, on a CPU, with the compiled kernels.

q, k and v are one product, gate and up another; everything between two products is one kernel. `layer` is one decoder
layer, `path` the whole base, `ranks` what a step's tokens use of the adapters. A layer takes the base's own modules,
the generic path, whenever an adapter of the step changes something there that the kernels do not compute.
"""
