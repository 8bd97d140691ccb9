"""Report on a run: samples, scores, loss curves, trajectories, an HTML page and a demo.

During training, `tracker.tracked` sends the log to a tracker. For a trained run,
`sample.sample_to_files` writes samples, `gallery.trajectories` draws them by number of passes, `benchmark.make_images`
makes the images of a benchmark, `evaluate.evaluate` scores the run, `page.write` writes its page, and `demo.build_page`
builds an interactive one. `compare.compare` and `figure.draw_logs` compare several runs, and `images.judge`
scores images that others made.
"""
