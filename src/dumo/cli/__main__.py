"""`python -m dumo.cli`, as torchrun starts it."""

from dumo.cli import main

main()
