"""The words of a report: what a measured number is called, which way is better, and what it says.

Nothing that a file of numbers calls a thing stands on the page by that key: what has no words here is at least spaced.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

LOWER, HIGHER = "lower is better", "higher is better"


@dataclass(frozen=True)
class Word:
    """A title for the head of a column, which way is better, and a sentence."""

    title: str
    better: str = ""
    meaning: str = ""


MERITS = {
    "fd_grey": Word(
        "Fréchet distance in a PNG",
        f"{LOWER}; not FID",
        "how far samples are from the data, clamped and rounded to 17 grey levels as a PNG holds them, on the features "
        "of dumo’s own classifier of digits. 0 is equal.",
    ),
    "fd": Word(
        "Fréchet distance",
        f"{LOWER}; not FID",
        "how far samples are from the data on the features of dumo’s own classifier of these images. 0 is equal.",
    ),
    "kid": Word(
        "kernel distance",
        f"{LOWER}; not FID",
        "on the same features, unbiased, so about 0 where nothing differs; ± is its spread over subsets.",
    ),
    "precision": Word("precision", HIGHER, "share of the samples that lie where the data are."),
    "recall": Word(
        "recall", HIGHER, "share of the data that lie where the samples are. It falls when kinds of images go missing."
    ),
    "accuracy": Word(
        "class accuracy", HIGHER, "share of the samples that the classifier reads as the class they were asked for."
    ),
    "auc": Word(
        "SVM two-sample AUC",
        f"{LOWER}, down to 0.5",
        "how well a support vector machine tells samples, as a PNG holds them, from real digits that it has not seen: "
        "0.5 is chance, 1 is always. It reads pixels and no features.",
    ),
    "auc_features": Word(
        "SVM two-sample AUC of features",
        f"{LOWER}, down to 0.5",
        "how well a support vector machine tells samples from as many real images by the same features: 0.5 is chance, "
        "1 is always.",
    ),
    "pixel_fd": Word(
        "Fréchet distance of pixels",
        f"{LOWER}; not FID",
        "of the pixels themselves, as a PNG holds them, with no network in between.",
    ),
    "nearest": Word(
        "distance from the training images",
        "1 is that of images held out",
        "mean distance of samples from the nearest image that was trained on, over that of images held out; of copies "
        "it is 0.",
    ),
    "copies": Word(
        "copies", LOWER, "share of the samples that are a training image again: far nearer to it than to the next."
    ),
    "mmd2": Word(
        "MMD²",
        LOWER,
        "squared maximum mean discrepancy, unbiased, of Gaussian kernels of five widths. Scatter about 0 is equal.",
    ),
    "bits": Word(
        "bits per number",
        LOWER,
        "-log2 of the density that the net's flow gives to data, over their numbers, and of images as many bits as a "
        "grey level's width takes; ± is the standard error.",
    ),
    "fid": Word("FID", LOWER, "Fréchet distance on the features of Inception, as the protocol fixes them."),
    "sfid": Word("sFID", LOWER, "the same on features that keep the place in the image."),
    "clip_score": Word(
        "CLIP score",
        f"{HIGHER}; not FID",
        "100 times the cosine of image and caption by the CLIP that was named; ± is the standard error.",
    ),
    "geneval": Word("GenEval", HIGHER, "mean of its tasks’ shares of correct images, by its own evaluator."),
    "dpg": Word("DPG-Bench", HIGHER, "out of 100, by its own evaluator."),
    "is": Word("Inception Score", HIGHER, "from Inception’s answers alone, whatever the data are."),
}
BEFORE = Word(
    "before rounding", f"{LOWER}; not FID", "the same for the samples as the net makes them."
)  # fd by fd_grey
REAL = "baseline: real vs real"
BASELINES = {
    "halves": Word(REAL, meaning="two random halves of the data, compared with each other; mean ± spread."),
    "bootstrap": Word(
        f"{REAL}, redrawn",
        meaning="as many rows as there are samples, drawn from the data with replacement, compared with the data: the "
        "lowest that so few samples can reach.",
    ),
    "held": Word(
        f"{REAL}, held out",
        meaning="as many training images as there are samples, drawn with replacement, compared with the images held "
        "out: the lowest that can be reached against so few.",
    ),
    "noise": Word("noise", meaning="what plain noise would have in place of samples."),
    "captions": Word("real images", meaning="some of the data with captions of theirs; mean ± standard error."),
    "others": Word("real images, other captions", meaning="the same with captions of other images: the floor."),
    "null": Word(REAL, meaning="two independent draws of the data, compared with each other; mean ± spread."),
}
WATCHED = {
    "head_gap": Word(
        "gap between the heads",
        meaning="mean square of v̂ − (û + t dû/dt), with the derivative along the target v★, as the loss has it. It "
        "does not vanish, for v★ scatters about the velocity, and t dû/dt with it. It starts at 0, where both heads "
        "do. Healthy if it then levels off; where u blows up, so does it.",
    ),
    "clipped_share": Word(
        "residuals beyond ±1",
        meaning="share of the entries of û − u★ that a clamp at 1 would cut, as some methods have it and this one has "
        "not. A third is usual near t = 0, where the target holds noise that nothing can tell. Healthy if it is less "
        "towards t = 1, and does not grow in training.",
    ),
    "cosine of v,u": Word(
        "cosine of v and u",
        meaning="between the gradients of the two losses, over the weights that both reach, on one batch. Above 0 a "
        "step for one head helps the other (the paper’s App. D); lastingly below, they are at odds.",
    ),
    "drift": Word(
        "drift of the endpoint",
        meaning="mean square of its change along the net’s own velocity, per unit of time; of DuMo, of v̂ − (û + t "
        "dû/dt) without the scatter. 0 if what the net reads is of one flow, and at the start, where all of it is 0. "
        "Healthy if it rises, falls again, and ends far below the mean square of the velocity, about 1.",
    ),
    "right": Word(
        "pairs in the right order",
        meaning="share of the pairs of an image and a sample in which the critic’s logit of the image is higher. "
        "Healthy between 0.5 and 0.9: at 1 it has won, and says little of where to go; at 0.5 it can tell nothing.",
    ),
    "margin": Word(
        "margin of the critic",
        meaning="its logit of an image less that of a sample. Healthy a little above 0. With half of the pairs in the "
        "right order and slopes at 0, the critic has collapsed.",
    ),
    "slopes": Word(
        "slopes of the critic",
        meaning="mean square of its slope at images and at samples, which its loss keeps low (R1 and R2). Where they "
        "go to 0, samples are moved no more; where they grow, lower its rate.",
    ),
    "log_variance": Word(
        "logarithm of the variance",
        meaning="that the net itself expects of the residual, by which it is divided. It falls as the loss does.",
    ),
}
STATES = {"untrained": "As good as untrained", "far": "Not yet like the data"}  # as an evaluation calls them
METHODS = {
    "alpha_flow": "α-Flow",
    "cmt": "CMT",
    "consistency": "consistency training",
    "critic": "DuMo and adversarial flow",
    "drift": "DuMo and Drifting",
    "dumo": "DuMo",
    "dumo_any": "DuMo-Any",
    "f2d2": "F2D2",
    "facm": "FACM",
    "flow_matching": "flow matching",
    "imf": "improved MeanFlow",
    "imm": "IMM",
    "match": "DuMo and distribution matching",
    "meanflow": "MeanFlow",
    "pi_flow": "π-Flow",
    "rcgm": "RCGM",
    "sct": "sCT",
    "several": "three heads",
    "shortcut": "Shortcut",
    "soflow": "SoFlow",
    "split_meanflow": "SplitMeanFlow",
    "tvm": "TVM",
    "twinflow": "TwinFlow",
    "ucgm": "UCGM",
}
NETS = {"dit": "diffusion transformer", "mlp": "perceptron", "unet": "U-Net"}


def word(words: Mapping[str, Word], key: str) -> Word:
    """The words for a key; its own, spaced, where there are none."""
    return words.get(key) or Word(key.replace("_", " "))


def watched(name: str) -> Word:
    """The words for a note, or for that of a part: `right_d` is `right`, of d."""
    of, _, part = name.rpartition("_")
    if name in WATCHED or of not in WATCHED:
        return word(WATCHED, name)
    return replace(WATCHED[of], title=f"{WATCHED[of].title}, {part}")


def merits(columns: list[str]) -> dict[str, Word]:
    """The words for the columns of a table; `fd` next to `fd_grey` is the same before rounding."""
    found = {key: word(MERITS, key) if key in MERITS else _against_held(key) for key in columns}
    return found | ({"fd": BEFORE} if {"fd", "fd_grey"} <= found.keys() else {})


def _against_held(key: str) -> Word:
    """The words for a score whose data are the images held out; of another unknown key itself, spaced."""
    of = MERITS.get(key.removesuffix("_held"))
    if of is None or not key.endswith("_held"):
        return word(MERITS, key)
    return Word(f"{of.title}, images held out", of.better, "the same against images that were never trained on, alone.")
