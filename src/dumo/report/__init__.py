"""Report on a run: samples, scores, loss curves, trajectories, an HTML page and a demo.

During training, `tracker.tracked` sends the log to a tracker. For a trained run, `sample_to_files.sample_to_files`
writes samples, `gallery.trajectories` draws them by NFE, `benchmark.make_images` makes the images of a benchmark,
`evaluation.evaluate` scores the run, `page.write` writes its page, and `demo_page.build_page` builds an interactive
one. `comparison.compare` and `figure.draw_logs` compare several runs, and `evaluate_images.judge` scores images that
others made.
"""
