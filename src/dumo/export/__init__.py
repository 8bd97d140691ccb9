"""A trained run as a folder for `dumo.load`, or as files of other programs: a pipeline of diffusers, a LoRA, one file.

`write.export` writes it, and `hub.push` uploads it; `stock.export_forms` says which forms a net can have. Touches the
folder that it writes, and the Hub. Knows no command line.
"""
