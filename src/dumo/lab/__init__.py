"""The lab: figures, tables and times made again. The library does without it."""
