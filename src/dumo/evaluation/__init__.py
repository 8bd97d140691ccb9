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

from typing import Annotated

from pydantic import Field

from dumo.evaluation.bits_per_dim import LikelihoodProtocol
from dumo.evaluation.bundled import ShippedProtocol
from dumo.evaluation.clip import ClipProtocol
from dumo.evaluation.features import FeatureProtocol
from dumo.evaluation.fid import ImageProtocol
from dumo.evaluation.protocol import Context as Context
from dumo.evaluation.wholeset import Reference as Reference

MetricProtocol = Annotated[
    ClipProtocol | FeatureProtocol | ImageProtocol | LikelihoodProtocol | ShippedProtocol,
    Field(discriminator="kind"),
]
