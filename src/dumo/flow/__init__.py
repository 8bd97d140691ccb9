"""Mathematics only: paths, laws of time, derivatives along the flow, guidance, and the one place that draws."""
