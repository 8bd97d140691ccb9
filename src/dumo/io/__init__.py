"""Files: written whole or not at all, safe to read; hashes, weights, tables, and pictures and arrays in them.

Touches the disk. Knows no run.
"""
