"""From noise to data with a trained net: solvers and their grids of time, guidance, batches of samples."""
