"""Training: one step, the loop around it, and what is kept between steps."""
