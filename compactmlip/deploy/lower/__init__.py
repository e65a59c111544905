"""Lowering: from a native model to the same function in the form that compiled operators run fastest.

Radial networks become tables, features that depend on the species only are folded into them, consecutive
linear maps are merged, and channels are padded to whole vectors.
"""
