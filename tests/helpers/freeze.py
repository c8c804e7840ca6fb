"""Importing this module excludes all objects that exist, such as loaded modules, from garbage collection, to save time."""

import gc

gc.freeze()
gc.set_threshold(20_000, 20)
