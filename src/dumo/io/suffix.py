"""File name suffixes of images. Does not import torch, so that a folder without images is reported quickly."""

_READABLE_SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
}
UNREADABLE_SUFFIXES = {".avif", ".heic", ".heif"}  # formats of mobile phones
# Files that count as images. Unreadable formats are included, so that error messages name these files.
IMAGE_SUFFIXES = _READABLE_SUFFIXES | UNREADABLE_SUFFIXES
TABLE_SUFFIXES = (".parquet", ".tar")  # files that contain images
