"""Export a trained run as a folder for `dumo.load`, a diffusers pipeline, a LoRA, or a single file of weights.

`write.export` writes it, `upload.push` uploads it, and `stock.export_forms` lists the formats that a net supports.
"""
