"""The one error class, with subclasses where a caller would branch."""


class SparsePluginError(RuntimeError):
    """Base of every error this package raises on purpose.

    Example:
        >>> from snn_sparse_plugin import SparsePluginError, sparse_mode
        >>> try:
        ...     sparse_mode(backprop_treshold=0.2).__enter__()
        ... except SparsePluginError as error:
        ...     print(type(error).__name__, error)
        ConfigError sparse mode has no option 'backprop_treshold'. Did you mean 'backprop_threshold'?
    """


class InputError(SparsePluginError, ValueError):
    """A tensor with the wrong shape, dtype, device or values."""


class NonFiniteError(InputError):
    """NaN or infinity where the fused kernels cannot carry it on as a step loop does."""


class ConfigError(SparsePluginError, ValueError):
    """An option that does not exist or a value outside its range."""


class UnsupportedError(SparsePluginError):
    """Something was asked for by name that cannot be done; the message says why and what can."""


class MissingDependencyError(SparsePluginError, ImportError):
    """An optional library is not installed; the message says what to install."""


class FusionError(SparsePluginError):
    """Recorded steps can no longer run as the step loop would have run them."""


class FileError(SparsePluginError, OSError):
    """A file that cannot be written: no room, no permission."""
