"""Captions of images, by number, and what a text encoder makes of them: a table with a row for each."""
