"""What a run says: samples, sheets, scores and their cards, trajectories, a page of all of it, a demo.

The entrances, in the order of a run's life: `sheet.Sheets` and `feed.live_feed` as it trains; then
`sample.sample_to_files`, `gallery.trajectories`, `benchmark.make_images`, `evaluate.evaluate`, `page.write` and
`demo.build_page`. `compare.compare` and `figure.comparison_picture` set several runs side by side; `images.judge`
scores images that others made.

Touches pictures and scores in the run's folder; a port and a tracker, if asked. Knows neither `export` nor `lab`.
"""
