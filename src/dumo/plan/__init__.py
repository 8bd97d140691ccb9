"""What one asks before paying for hours: what a run costs, whether it fits this machine, a run for your photos.

Touches the machine, to measure, and your images, to look. Writes nothing.
"""
