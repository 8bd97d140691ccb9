"""Files: written whole or not at all, safe to read, named by what the user gave; pictures and arrays in them."""
