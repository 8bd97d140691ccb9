"""Before training: estimate the cost of a run, test it on this machine, and choose a recipe for photos.

Reads images and computes on the device, but writes nothing.
"""
