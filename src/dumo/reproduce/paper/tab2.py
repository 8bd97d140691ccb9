"""Table 2: CIFAR-10 without classes, in one pass.

The paper's nets are U-Nets of 55 M parameters in pixels, its numbers FIDs of long trainings. At home it is a small DiT
in latents, minutes long, and the distance is taken in the features of the shipped classifier: no FID. What is to be
compared is the order, not the numbers. Every objective comes with its digits recipe's constants.
"""

from collections.abc import Sequence

from dumo.reproduce import arm
from dumo.reproduce.arm import Arm

ARMS: dict[str, tuple[str, float | None]] = {  # digits recipe, the paper's FID
    "DuMo": ("digits", 2.86),
    "MeanFlow": ("digits-meanflow", 2.92),
    "iCT": ("digits-ict", 2.83),
    "ECT": ("digits-ect", 3.60),
    "sCT": ("digits-sct", 2.97),
    "IMM": ("digits-imm", 3.20),
    "SoFlow": ("digits-soflow", None),
    "Flow matching": ("digits-flow-matching", None),
}
UNLABELLED = (  # a cache of its own
    "data.root=runs/latents/cifar10-taef2-unlabelled",
    "data.images.labelled=false",
    "data.images.classes=0",
)


def arms(scale: str) -> Sequence[Arm]:
    """By title, on the small recipe or on the paper's."""
    host = "cifar10" if scale == "paper" else "cifar10-latents"
    own = {"DuMo": "cifar10", "MeanFlow": "cifar10-meanflow"} if scale == "paper" else {}
    sets = ("evaluate.nfe=[1]", *(UNLABELLED if scale != "paper" else ()))
    return [
        Arm(
            recipe.replace("digits", "cifar10"),
            own.get(title, host),
            (*(() if title in own else arm.taught(recipe, host)), *sets),
            {"objective": title, "paper_fid_cifar10_unet_55m": fid},
        )
        for title, (recipe, fid) in ARMS.items()
    ]


PLAN = arm.comparison(
    "CIFAR-10 without classes, one pass (Tab. 2)", "tab2", arms, seeds=2, small=arm.LATENTS, samples=True
)
