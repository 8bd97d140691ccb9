"""A run as one value: its parts by name, its text, whether its values fit together.

Touches its own text, names of classes and files of captions. Makes no net and asks no device.
"""
