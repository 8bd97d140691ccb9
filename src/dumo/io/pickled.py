"""Pickles, of which dumo reads none: one can run whatever code it likes when it is opened."""

from pathlib import Path

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")


def conversion(file: str, out: str) -> str:
    """The line that a user runs, once, to make a safetensors file of published weights."""
    return (
        'python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{file}', weights_only=True), '{out}', dict(format='pt'))\""
    )


def refusal(file: Path, line: str) -> str:
    """Why a pickle is refused, and the way out: the line."""
    return f"{file}: dumo reads no pickle, which can run code. Convert it once, where you trust it:\n  {line}"
