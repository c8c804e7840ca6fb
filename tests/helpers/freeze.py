"""Lets the garbage collector pass over the modules that are loaded, which it would otherwise visit thousands of times."""

import gc

gc.freeze()
gc.set_threshold(20_000, 20)
