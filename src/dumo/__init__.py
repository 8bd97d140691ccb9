"""dumo: train generative models that make an image in one or two network evaluations.

    import dumo

    run = dumo.train("digits", {"train.steps": 200})    # a recipe, a YAML file, or a run's folder: goes on from there
    run = dumo.train("photos", minutes=10)              # a folder of images
    run = dumo.train(data=array, net=module, objective="meanflow", callbacks=[f], out="runs/mine")  # raise dumo.Stop
    run = dumo.load("runs/digits")                      # a run that was trained
    images = run.sample(labels=[3, 5], nfe=1, seed=0)   # (2, 1, 8, 8), in [-1, 1]; output="pil": pictures
    run.evaluate(nfe=[1, 2])["results"]                 # distances to the data, and those of the data themselves
    run.report()                                        # one page with all of it
    run.export("out")                                   # as diffusers opens it
    spec = dumo.recipe("digits", {"net.depth": 2})      # the settings alone; dumo.recipes() lists all
    dumo.compare([run, "runs/other"])["rows"]           # evaluations side by side

    flow = dumo.Flow(net, "meanflow", classes=10)       # in a training loop of your own: loss = flow(x, c)
    images = flow.sample(16, nfe=1)
    u, du_dt = dumo.jvp(net, (x, t), (v, one))          # value and exact derivative, in any loop

What is wrong raises `dumo.UserError`, with the way out. `run.net`, `run.readings` and `run.spec` are the network, what
a solver calls, and the settings.
"""

from importlib import import_module

__all__ = ["Flow", "Stop", "UserError", "compare", "jvp", "load", "recipe", "recipes", "train"]  # pyright: ignore[reportUnsupportedDunderAll], see __init__.pyi

HOMES = {"Flow": "dumo.flow.module", "Stop": "dumo.cli.train_callback", "jvp": "dumo.autodiff.jvp"}


def __getattr__(name: str) -> object:
    """Imported on first use, for torch takes seconds."""
    if name == "__version__":
        return import_module("dumo.runtime").version()
    if name not in __all__:
        raise AttributeError(f"module 'dumo' has no attribute '{name}'")
    return getattr(import_module(HOMES.get(name, "dumo.cli.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
