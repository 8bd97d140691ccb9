"""What a run says: samples, scores with their cards, curves of its log, trajectories, a page of all of it, a demo.

While a run trains, `tracker.tracked` sends its log. Of a trained run,
`sample.sample_to_files` writes samples, `gallery.trajectories` draws them by number of passes, `benchmark.make_images`
makes the images of a benchmark, `evaluate.evaluate` scores the run, `page.write` writes its page, and `demo.build_page`
serves one to play with. `compare.compare` and `figure.draw_logs` set several runs side by side, and `images.judge`
scores images that others made.
"""
