"""The experiments of the publications behind this package, on real data, from one command."""

from .run import run_study
from .settings import SETTINGS, Settings, settings_of
from .study import Study
from .training import Training, Trial

__all__ = ["SETTINGS", "Settings", "Study", "Training", "Trial", "run_study", "settings_of"]
