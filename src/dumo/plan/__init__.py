"""What one asks before training: what a run is and costs, whether it is right on this machine, a run for one's photos.

Reads images, and computes on the device to test. Writes nothing.
"""
