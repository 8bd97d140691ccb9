"""A run and its folder: train it, open it, sample it, encode its data, ask its teacher."""
