"""A trained run as files that other programs read: a pipeline of diffusers, a LoRA, or one file of weights.

Touches the folder that it writes, and the Hub.
"""
