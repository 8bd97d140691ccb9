"""Upper bounds of the numbers in a run, far above realistic values, to catch typing errors.

Spec fields use them (`Field(le=STEPS)`), so a larger number is refused when the spec is parsed, not after a long time
by an endless loop or a lack of memory. All bounds are our choice.
"""

BLOCKS = 1000  # of a net, one behind the other: as the deepest ResNets
CHANNELS = 2**16  # a net's width, heads of attention: 4 times the widest of language models
CLASSES = 2**24  # 700 times ImageNet-21k's
FACTOR = 1e6  # of anything that is multiplied: a rate, a weight, a scale
GIGABYTES = 1e6  # of memory: a petabyte
MINUTES = 1e6  # of a training: two years
PASSES = 100_000  # through a net for one sample: a hundred times the 1000 steps of the first diffusion models
PIXELS = 2**14  # along a side: 268 megapixels
ROWS = 2**20  # of a batch: 16 times the largest that images were trained with
SAMPLES = 10**8  # made at once, or by a teacher: its labels alone take 0.8 GB
STEPS = 10**9  # of a training: one in a millisecond takes 11 days
TOKENS = 2**15  # of a text: the longest that text encoders read

GIGABYTE = 1e9  # bytes: the unit of fields of memory


def require_order(**ends: float) -> None:
    """Raise ValueError if the first of two numbers exceeds the second: `require_order(low=2, high=1)`."""
    (low, first), (high, second) = ends.items()
    if first > second:
        raise ValueError(f"{low} ({first}) must not be above {high} ({second})")
