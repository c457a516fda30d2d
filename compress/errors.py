"""Every exception raised on purpose, one line each, with the exit code the command line ends with."""


class CompressError(Exception):
    """Something a user can act on. The text is one line: what, the value given, what is allowed, what to do."""

    exit_code = 1


class UsageError(CompressError):
    """An option or a recipe value that cannot be used."""

    exit_code = 2


class RunFolderError(UsageError):
    """A run folder that exists already, is in use by another process, or holds no run."""


class LoadError(CompressError):
    """An input that cannot be loaded: a checkpoint, an architecture, an ONNX file."""

    exit_code = 3


class DataError(LoadError):
    """A data set that cannot be loaded or cannot be trained on."""


class PruneError(CompressError):
    """A model that cannot be pruned: no group of channels may be removed, or tracing failed."""

    exit_code = 4


class TargetError(CompressError):
    """A target that no allowed cut reaches; `lowest` is the smallest reachable share of the metric, 0 to 1."""

    exit_code = 5

    def __init__(self, text: str, *, lowest: float) -> None:
        super().__init__(text)
        self.lowest = lowest


class ParityError(CompressError):
    """An ONNX file whose outputs are not the network's; the file has been removed."""

    exit_code = 6


class AccuracyError(CompressError):
    """An accuracy budget that no network found satisfies."""

    exit_code = 7


class DivergedError(CompressError):
    """A loss that became NaN or infinite; the last good state has been kept."""


class MeasureError(CompressError):
    """A latency that could not be measured as asked, for example a provider that is not active."""


class TrackerError(UsageError):
    """An experiment tracker that is not installed."""


class ElsewhereError(CompressError):
    """What another process of the run failed with; that one says it, and all end with its exit code."""

    def __init__(self, text: str, *, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code
