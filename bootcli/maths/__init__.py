"""Pure mathematics: tensors in, tensors out. Nothing here draws, logs, saves or knows a network.

One clock for everything: ``x_t = alpha_t * x_0 + sigma_t * eps`` with t = 1 noise and t = 0 data.
"""
