"""Mathematics only: paths, laws of time, derivatives along the flow, guidance, and what a loss is shown."""
