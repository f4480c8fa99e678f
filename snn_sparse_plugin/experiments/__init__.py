"""The experiments of the publications behind this package, on real data, from one command."""

from .run import run_study
from .settings import CONV_SETTINGS, SETTINGS, ConvSettings, Settings, conv_settings_of, settings_of
from .study import Study
from .training import Training, Trial

__all__ = [
    "CONV_SETTINGS",
    "SETTINGS",
    "ConvSettings",
    "Settings",
    "Study",
    "Training",
    "Trial",
    "conv_settings_of",
    "run_study",
    "settings_of",
]
