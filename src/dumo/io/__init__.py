"""Files: written whole or not at all, safe to read; pictures and arrays in them."""
