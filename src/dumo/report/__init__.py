"""A run as pictures: sheets, trajectories, charts, and the page that joins them."""
