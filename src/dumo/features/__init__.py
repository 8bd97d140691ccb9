"""Networks whose activations are the features of a metric: Inception, and the shipped classifiers."""
