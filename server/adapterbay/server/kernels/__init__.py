"""Kernels of our own for a CPU, compiled on the machine that runs them.

`loader` compiles `src/` once and keeps the result, `ops` are the operators, `weights` the layout of weights that their
matrix product reads, `quantized` linear layers of fewer bits. Nothing here knows of adapters' names, rows or requests.
"""
