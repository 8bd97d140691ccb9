"""Distances between samples and data: by statistics of features, by kernels, by neighbours."""
