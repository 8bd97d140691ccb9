"""What a run says: samples, sheets, scores and their cards, trajectories, a page of all of it, a demo.

Touches pictures and scores in the run's folder; a port and a tracker, if asked.
"""
