"""`dumo`, whose log has a line of progress for each piece of work as it is done, not one a minute."""

from dumo import cli
from dumo.runtime import progress

progress._LINE_SECONDS = 0

if __name__ == "__main__":
    cli.main()
