"""Files of images, by the ends of their names. Imports no torch, so that a folder without images is named at once."""

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
UNREADABLE_SUFFIXES = {".avif", ".heic", ".heif"}  # of telephones' formats
# What is taken for an image by its name. Telephones' formats cannot be read, but errors then name such files.
IMAGE_SUFFIXES = _READABLE_SUFFIXES | UNREADABLE_SUFFIXES
TABLE_SUFFIXES = (".parquet", ".tar")  # of files that hold images
