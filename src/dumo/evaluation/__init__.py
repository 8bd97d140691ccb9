"""Evaluation protocols: named ways to score samples, so that scores under the same name are comparable.

A protocol fixes the features, the number of samples, their labels, rounding, splits and seeds. Deviations, such as
another number of samples, show in its name. Call order:

    protocol.check(shape, classes)                   # raises UserError if such samples cannot be evaluated
    c = protocol.labels(classes)                     # generate sample i with class c[i]
    evaluator = protocol.evaluator(Context(data, classes, seed, device))
    evaluator.score(batches), evaluator.baselines(), evaluator.facts

`baselines` has the scores of a perfect sampler, which draws new real images: distances between finite sets are not 0.
This subpackage depends on neither networks nor runs.
"""

from typing import Annotated

from pydantic import Field

from dumo.evaluation.bits_per_dim import LikelihoodProtocol
from dumo.evaluation.bundled import BundledProtocol
from dumo.evaluation.clip import ClipProtocol
from dumo.evaluation.features import FeatureProtocol
from dumo.evaluation.fid import ImageProtocol
from dumo.evaluation.protocol import Context as Context
from dumo.evaluation.wholeset import Reference as Reference

MetricProtocol = Annotated[
    ClipProtocol | FeatureProtocol | ImageProtocol | LikelihoodProtocol | BundledProtocol,
    Field(discriminator="kind"),
]
