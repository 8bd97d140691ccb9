"""dumo: train generative models that make an image in one or two network passes.

The packages, from the ground up; each imports only from those above it in this list, and none of its own line:

types                            the nouns that all share; how large numbers may be
autodiff, runtime                exact derivatives that ride on a pass; ranks, signals, memory, random numbers by key
flow, io                         paths, laws of time, slopes, guidance, solvers; files and pictures
encoders, objectives, training   autoencoders and text encoders; losses; a step and the loop around it
data, evaluation, nets           images and latents; protocols and distances; networks
run                              a run: its spec, what it plans, training, sampling, measuring
export, lab, report              stock folders; the paper's figures again; a page with all of it
cli                              the commands, and what `import dumo` offers
"""

from importlib import import_module

__all__ = ["UserError", "load", "recipe", "train"]  # pyright: ignore[reportUnsupportedDunderAll], see __init__.pyi


def __getattr__(name: str) -> object:
    """Imported on first use, for torch takes seconds."""
    if name == "__version__":
        return import_module("dumo.runtime").version()
    if name not in __all__:
        raise AttributeError(f"module 'dumo' has no attribute '{name}'")
    return getattr(import_module("dumo.cli.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
