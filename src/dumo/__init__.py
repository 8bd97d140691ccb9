"""dumo: train generative models that make an image in one or two network passes.

The rooms, from the ground up; each imports only what stands above it in this list, and none of its own paragraph:

place                   rows by place, and their way to a device

types, bound            the nouns that all share; how large numbers may be

stop                    stopping when asked

peer                    the other processes of a run

random, dist            random numbers by key; ranks
progress, recipes       how far a work is; the packaged runs
ahead, room             what a step needs, made before it; what a machine has room for

io                      files, whole or not at all; pictures

autodiff                dual numbers: exact derivatives that ride on a pass

flow                    paths, laws of time, slopes, guidance, the draw of a step, readings

codecs, texts           autoencoders; captions, and what text encoders make of them

data, nets, objectives  images, points, latents; networks; how to train one and read it afterwards
sampling, training      solvers; a step, the loop around it, what is kept
features, metrics       what a distance is measured on; the distances

protocols               named ways to measure samples

config                  a run as one tree of values

preflight               what one asks before paying for hours: doctor, cost, plan, rehearsal, show

run                     train, open, sample, encode, ask a teacher

evaluation              a run measured, its card; runs compared

report, export          one page with all of it; a net as stock programs take it

demo                    a page to play with a run

lab                     figures, tables and times made again

api                     what `import dumo` offers: load, train, recipe

cli                     the commands
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["UserError", "load", "recipe", "train"]

if TYPE_CHECKING:
    from dumo.api import UserError, load, recipe, train
else:  # torch takes seconds to import: it waits for the first use

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'dumo' has no attribute '{name}'")
        return getattr(import_module("dumo.api"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
