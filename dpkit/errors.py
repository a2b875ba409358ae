"""Every error that dpkit raises; those of ``accounting`` are repeated here so that one import is enough.

DpkitError
├── InvalidArgument          a value outside its domain (also a ValueError)
├── DataError                a data folder or file that is missing or is not what it should be
├── ConfigError              a configuration file with unknown keys or wrong values
├── RunFolderError           a run folder that cannot be used, or a path that leaves it
├── CheckpointError          a checkpoint that is damaged, or of another model, plan or run
├── OutOfMemory              a batch that did not fit, with the number of rows that would
└── Refused                  what dpkit will not do, named, with the way out
    ├── UnsupportedOperation     an operation on a trainable parameter without a per-sample rule
    ├── UnsupportedModule        a module that mixes examples or moves buffers (BatchNorm in training mode, ...)
    ├── UnsupportedOptimizer     LBFGS, GradScaler, optimizers that move without gradients
    ├── UnsupportedLoader        iterable data sets, samplers that are not the plan's
    ├── LossShape                the loss is not one value per example
    ├── CrossExample             the neighbour probe saw one example move another one's gradient
    ├── UncoveredParameter       a trainable parameter that would escape clipping and noise
    ├── RawGradient              a gradient reached a parameter without passing the engine
    └── OutOfOrder               backward, release and next batch came in an order that breaks the guarantee
"""

from accounting.errors import (
    AccountingError as AccountingError,
)
from accounting.errors import (
    BudgetExceeded as BudgetExceeded,
)
from accounting.errors import (
    InvalidParameter as InvalidParameter,
)
from accounting.errors import (
    LedgerError as LedgerError,
)
from accounting.errors import (
    TargetUnreachable as TargetUnreachable,
)
from accounting.errors import (
    Unsupported as Unsupported,
)


class DpkitError(Exception):
    """Base of all errors of dpkit's own layers."""


class InvalidArgument(DpkitError, ValueError):
    """A value outside its domain."""


class DataError(DpkitError):
    """A data folder or file is missing, or is not what it should be."""


class ConfigError(DpkitError):
    """A configuration file has unknown keys or wrong values."""


class RunFolderError(DpkitError):
    """A run folder cannot be read, written or locked, or a path would leave it."""


class CheckpointError(DpkitError):
    """A checkpoint cannot be written, or is damaged, or is of another model, plan or run."""


class OutOfMemory(DpkitError):
    """A batch did not fit into memory; the message says how many rows would."""


class Refused(DpkitError):
    """dpkit will not do this; the message names the thing, the rule and the way out.

    Attributes:
      parameters: the names of those that it is about, if it is about an operation on parameters.
      operation: the torch function, likewise.
    """

    parameters: tuple[str, ...] = ()
    operation: str = ""


class UnsupportedOperation(Refused):
    """An operation on a trainable parameter has no per-sample gradient rule."""


class UnsupportedModule(Refused):
    """A module mixes the examples of a batch, or moves buffers with them."""


class UnsupportedOptimizer(Refused):
    """The optimizer, or what wraps it, would not keep the guarantee."""


class UnsupportedLoader(Refused):
    """The loader's data set or sampler cannot be sampled as the plan says."""


class LossShape(Refused):
    """The loss is not one value per example."""


class CrossExample(Refused):
    """One example moved another example's gradient."""


class UncoveredParameter(Refused):
    """A trainable parameter would be trained without clipping and noise."""


class RawGradient(Refused):
    """A gradient reached a parameter without passing the engine."""


class OutOfOrder(Refused):
    """Calls came in an order that would break the guarantee."""
