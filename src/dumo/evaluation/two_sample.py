"""The classifier two-sample test: can a classifier distinguish fake rows from real ones?

`two_sample_auc` learns from one half of each set and orders the other half. `auc_sd` says how far the result scatters
where both sets have one distribution. The area under the curve (AUC) is the chance that a random fake row comes behind
a random real row: 0.5 for equal distributions, 1 where the sets do not mix. Lopez-Paz & Oquab 2017 count right answers
instead; the area needs no threshold.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

Real = Float[Tensor, "n *d"]
Fake = Float[Tensor, "m *d"]


def two_sample_auc(real: Real, fake: Fake, generator: Generator) -> float:
    """The area under the curve of a classifier between real and fake rows, in [0, 1]; 0.5 where nothing differs.

    Rows are split into random halves. One half trains the classifier and the other is ordered, then the halves change
    their parts, and the two areas are averaged. The classifier is scikit-learn's support vector machine as it comes:
    C = 1, a Gaussian kernel whose width comes from the spread of the rows. Its time grows as the square of the rows:
    half a second for 4,000 of 64 numbers. Each side needs 4 rows or more.
    """
    from sklearn.metrics import roc_auc_score  # slow to import
    from sklearn.svm import SVC

    real_halves = _random_halves(real, generator)
    fake_halves = _random_halves(fake, generator)
    areas: list[float] = []
    for train_half, test_half in ((0, 1), (1, 0)):
        train_rows, train_labels = _with_labels(real_halves[train_half], fake_halves[train_half])
        classifier = SVC().fit(train_rows, train_labels)
        test_rows, test_labels = _with_labels(real_halves[test_half], fake_halves[test_half])
        areas.append(float(roc_auc_score(test_labels, classifier.decision_function(test_rows))))
    return sum(areas) / 2


def auc_sd(num_samples: int, num_real: int) -> float:
    """The sd of `two_sample_auc` about 0.5 where both sides have one distribution (Mann & Whitney 1947).

    It is that of one area. The mean of the two areas has it too, for both see the same difference between the halves.
    """
    n = num_samples // 2
    m = num_real // 2
    return ((n + m + 1) / (12 * n * m)) ** 0.5


def _random_halves(x: Tensor, generator: Generator) -> tuple[Tensor, ...]:
    """The rows of x in random order, flat, in float64 and on the CPU, as two halves."""
    order = torch.randperm(len(x), generator=generator)
    return x[order].double().flatten(1).cpu().chunk(2)


def _with_labels(real: Tensor, fake: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n + m, d) of both sets, real ones first, and their labels (n + m,): 0 real, 1 fake."""
    rows = torch.cat([real, fake]).numpy()
    is_fake = np.repeat([0, 1], [len(real), len(fake)])
    return rows, is_fake
