"""A value at work: resolved once, then trained in its folder, opened, sampled, its data encoded, its teacher asked.

Touches the run's folder, and caches and tables that it makes. Knows neither `plan` nor `report`.
"""
