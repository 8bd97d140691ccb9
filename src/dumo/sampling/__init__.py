"""From noise to data with a trained net: time grids, solvers, noise by image, pictures and the files they go to."""
