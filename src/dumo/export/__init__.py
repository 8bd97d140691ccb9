"""A trained run as files that other programs read: a pipeline of diffusers, a LoRA, or one file of weights.

`write.export` writes it, and `hub.push` uploads it; `stock.export_forms` says which forms a net can have. Touches the
folder that it writes, and the Hub. Knows no command line.
"""
