"""Privacy accounting: events, epsilon, calibration, the ledger and the statement. No PyTorch, no dpkit.

What this package guarantees:

* ``epsilon(event, delta, relation=...)`` returns an upper bound: no pair of neighbouring data sets is easier to tell
  apart from what the event releases. It covers both directions (a record added, a record removed), is never NaN and
  never negative, and what no theorem here covers raises ``Unsupported``.
* ``calibrate_noise_multiplier`` returns noise at which that bound was evaluated and found within the target.
* ``Ledger.charge`` returns after the charge is on the disk. What is wrong with a ledger raises ``LedgerError``.
* ``statement`` rounds up, and never gives epsilon without delta, unit, relation, sampling and accountant.

What it does not: it believes the events. That training really sampled, clipped and added noise as the event says is
the trainer's promise. Choices made by looking at the data outside the ledger are not accounted.
"""

from .accountant import Bound as Bound
from .accountant import delta as delta
from .accountant import epsilon as epsilon
from .calibrate import calibrate_noise_multiplier as calibrate_noise_multiplier
from .crosscheck import Check as Check
from .crosscheck import crosscheck as crosscheck
from .errors import AccountingError as AccountingError
from .errors import BudgetExceeded as BudgetExceeded
from .errors import InvalidParameter as InvalidParameter
from .errors import LedgerError as LedgerError
from .errors import TargetUnreachable as TargetUnreachable
from .errors import Unsupported as Unsupported
from .events import Composed as Composed
from .events import Event as Event
from .events import Gaussian as Gaussian
from .events import Poisson as Poisson
from .events import Relation as Relation
from .events import Repeated as Repeated
from .events import TruncatedPoisson as TruncatedPoisson
from .events import event_from_json as event_from_json
from .events import event_to_json as event_to_json
from .ledger import Ledger as Ledger
from .normal_form import normal_form as normal_form
from .records import Budget as Budget
from .records import PlanRecord as PlanRecord
from .records import Receipt as Receipt
from .records import Spent as Spent
from .rounding import round_up as round_up
from .rounding import round_up_text as round_up_text
from .statement import PlanStatement as PlanStatement
from .statement import Statement as Statement
from .statement import statement as statement
