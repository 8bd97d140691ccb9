"""Named ways to judge samples, so that two numbers under one name were measured in one way.

A protocol fixes the features, the number of samples, their labels, rounding, splits and seeds; what may be set, the
number of samples first, shows in its name. It is used in this order:

    protocol.check(shape, classes)                   before any work: is this what it judges?
    c = protocol.labels(classes)                     the classes of the samples that it wants, image i of class c[i]
    evaluator = protocol.evaluator(Context(data, classes, seed, device))
    evaluator.score(batches), evaluator.baselines(), evaluator.facts          see `dumo.evaluation.protocol`

`baselines` says what a perfect sampler would have, one that makes new real images: a distance of few to few is not 0.

Touches reference statistics. Knows no net and no run.
"""

from typing import TYPE_CHECKING, Annotated

from dumo.types import Spec
from dumo.types.family import SpecFamily, is_instance_of, lazy_names

MEMBERS = {  # by kind
    "clip-score": "dumo.evaluation.clip:ClipProtocol",
    "cmmd": "dumo.evaluation.features:FeatureProtocol",
    "dinov2": "dumo.evaluation.features:FeatureProtocol",
    "adm-imagenet256-50k": "dumo.evaluation.images:ImageProtocol",
    "adm-imagenet512-50k": "dumo.evaluation.images:ImageProtocol",
    "cifar10-train50k": "dumo.evaluation.images:ImageProtocol",
    "folder": "dumo.evaluation.images:ImageProtocol",
    "likelihood": "dumo.evaluation.likelihood:LikelihoodProtocol",
    "cifar10-features": "dumo.evaluation.shipped:ShippedProtocol",
    "digits": "dumo.evaluation.shipped:ShippedProtocol",
    "photos": "dumo.evaluation.shipped:ShippedProtocol",
    "toy": "dumo.evaluation.shipped:ShippedProtocol",
}
FAMILY = SpecFamily(MEMBERS)
OTHERS = ("dumo.evaluation.protocol:Context", "dumo.evaluation.wholeset:Reference")

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from dumo.evaluation.clip import ClipProtocol as ClipProtocol
    from dumo.evaluation.features import FeatureProtocol as FeatureProtocol
    from dumo.evaluation.images import ImageProtocol as ImageProtocol
    from dumo.evaluation.likelihood import LikelihoodProtocol as LikelihoodProtocol
    from dumo.evaluation.protocol import Context as Context
    from dumo.evaluation.shipped import ShippedProtocol as ShippedProtocol
    from dumo.evaluation.wholeset import Reference as Reference

    MetricProtocol = ClipProtocol | FeatureProtocol | ImageProtocol | LikelihoodProtocol | ShippedProtocol
else:
    MetricProtocol = Annotated[Spec, FAMILY]
    __getattr__ = lazy_names(__name__, (*MEMBERS.values(), *OTHERS))


def is_of_inception(protocol: object) -> "TypeIs[ImageProtocol]":
    """Whether a protocol judges by Inception's features."""
    return is_instance_of(protocol, "dumo.evaluation.images:ImageProtocol")


def is_of_likelihood(protocol: object) -> "TypeIs[LikelihoodProtocol]":
    """Whether a protocol judges by the likelihood of the data."""
    return is_instance_of(protocol, "dumo.evaluation.likelihood:LikelihoodProtocol")


def is_shipped(protocol: object) -> "TypeIs[ShippedProtocol]":
    """Whether a protocol judges by what comes with dumo."""
    return is_instance_of(protocol, "dumo.evaluation.shipped:ShippedProtocol")
