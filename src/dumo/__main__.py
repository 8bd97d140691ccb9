"""`python -m dumo`, the same as `dumo`."""

from dumo.cli import main

main()
