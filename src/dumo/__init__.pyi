from dumo.autodiff.jvp import jvp as jvp
from dumo.cli.api import UserError as UserError
from dumo.cli.api import compare as compare
from dumo.cli.api import load as load
from dumo.cli.api import recipe as recipe
from dumo.cli.api import recipes as recipes
from dumo.cli.api import train as train
from dumo.cli.train_callback import Stop as Stop
from dumo.flow.module import Flow as Flow

__version__: str
