"""dumo: train generative models that make an image in one or two network passes.

The rooms, from the ground up; each imports those below it:

types · random · dist · progress     the nouns that all share; random numbers by key; ranks; how far a work is
io                                   files, whole or not at all; pictures
autodiff                             dual numbers: exact derivatives that ride on a pass
flow                                 paths, laws of time, slopes, guidance, the draw of a step, readings
codecs · nets · objectives           autoencoders; networks; how to train one and read it afterwards
data · features · metrics            images, points, latents; what a distance is measured on; the distances
sampling · training                  solvers; a step, the loop around it, what is kept
protocols                            named ways to measure samples
config · recipes                     a run as one tree of values; the packaged ones
preflight                            what one asks before paying for hours: doctor, cost, plan, rehearsal
run                                  train, open, sample, encode, ask a teacher
evaluation · report · reproduce · bench · cli
"""

__version__ = "0.1.0"
