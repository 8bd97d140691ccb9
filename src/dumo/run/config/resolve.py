"""What disk and machine say of a run: found once, when it is opened, and recorded in its run.yaml as `resolved`."""

from dumo.data import Data, Images, Latents
from dumo.nets.table import Tabled
from dumo.run.config.check import check
from dumo.run.config.load import differences
from dumo.run.config.spec import Run
from dumo.types import UserError


def resolve(run: Run) -> Run:
    """The run with the classes and names of its data, its captions' digest, and the identity of its table of texts.

    A run that has them, as one read from its folder, stays as it is; so does what is not there yet. Raises UserError
    where what is found contradicts the spec.
    """
    texts, net = run.net.texts, run.net
    if isinstance(texts, Tabled):
        net = net.model_copy(update={"texts": texts.found()})
    found = run.model_copy(update={"data": found_data(run.data), "net": net})
    if not (new := {one.field: one.now for one in differences(run, found)}):
        return run
    check(found)
    return found.model_copy(update={"resolved": run.resolved | new})


def found_data(data: Data) -> Data:
    """The data with what their files say of them. Raises UserError as `resolve`, after the field of the images."""
    try:
        return data.found() if isinstance(data, Images | Latents) else data
    except UserError as error:
        raise UserError(f"data{'.images' * isinstance(data, Latents)}: {error}") from error
