"""How samples are judged: statistics of features, kernels and neighbours, and the named protocols that join them."""
