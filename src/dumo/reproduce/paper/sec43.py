"""Section 4.3: does a third head help? DuMo's two beside velocity, endpoint and MeanFlow, or Shortcut, on one trunk."""

from collections.abc import Sequence

from dumo.reproduce import arm
from dumo.reproduce.arm import Arm

ARMS = {  # recipe, the paper's FID in one pass: XL/2, 432 epochs with two heads, 424 with three
    "DuMo": ("digits", 2.60),
    "+ MeanFlow": ("digits-three-heads", 2.84),
    "+ Shortcut": ("digits-three-heads-shortcut", 4.73),
}
HOST = "imagenet256-xl2-432"
EPOCHS = 424 / 432


def arms(scale: str) -> Sequence[Arm]:
    """By title. At the paper's size the heads come onto its recipe, which keeps times, guidance and slope."""
    found: list[Arm] = []
    for title, (recipe, fid) in ARMS.items():
        labels = {"heads": title, "paper_fid_imagenet256_xl2_1_pass": fid}
        if scale != "paper":
            found.append(Arm(recipe, recipe, ("evaluate.nfe=[1,2]", "evaluate.contrast=[]"), labels))
        elif title == "DuMo":
            found.append(Arm(HOST, HOST, (), labels))
        else:
            steps = round(Arm(HOST, HOST).load().train.steps * EPOCHS)
            sets = (*arm.taught(recipe, HOST, kept=("drop", "guide", "slope")), f"train.steps={steps}")
            found.append(Arm(recipe.replace("digits", "imagenet256-xl2"), HOST, sets, labels))
    return found


PLAN = arm.comparison("Two heads and three (Sec. 4.3)", "sec43", arms, seeds=2)
