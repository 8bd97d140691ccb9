"""dumo: train generative models that make an image in one or two network passes.

dumo.types        the nouns: Noised, Terms, Needs, Reads, Net, Objective
dumo.flow         paths, laws of time, slopes, guidance, draws
dumo.objectives   DuMo, FlowMatching, MeanFlow
dumo.run.train          train, sample, evaluate
"""

__version__ = "0.1.0"
