"""Privacy accounting: events, epsilon, calibration, the ledger and the statement. No PyTorch, no dpkit.

What this package guarantees:

* ``epsilon(event, delta, relation=...)`` returns an upper bound: no pair of neighbouring data sets is easier to tell
  apart from what the event releases. It covers both directions (a record added, a record removed), is never NaN and
  never negative, and what no theorem here covers raises ``Unsupported``.
* ``calibrate_noise_multiplier``, ``calibrate_steps`` and ``calibrate_sample_rate`` return a number at which that bound
  was evaluated and found within the target.
* A filter (``RenyiFilter``, ``ZCDPFilter``) admits no event that would break its promise, however events are chosen.
* ``Ledger.charge`` returns after the charge is on the disk. What is wrong with a ledger raises ``LedgerError``.
* ``statement`` rounds up, and never gives epsilon without delta, unit, relation, sampling and accountant.

What it does not: it believes the events. That training really sampled, clipped and added noise as the event says is
the trainer's promise. Choices made by looking at the data outside the ledger are not accounted; what a search for
hyperparameters costs is in ``accounting.selection``, and noise that is correlated over steps in ``accounting.matrix``.
"""

from .accountant import Bound as Bound
from .accountant import delta as delta
from .accountant import epsilon as epsilon
from .accountant import epsilon_curve as epsilon_curve
from .calibrate import calibrate_noise_multiplier as calibrate_noise_multiplier
from .calibrate import calibrate_sample_rate as calibrate_sample_rate
from .calibrate import calibrate_steps as calibrate_steps
from .crosscheck import Check as Check
from .crosscheck import crosscheck as crosscheck
from .errors import AccountingError as AccountingError
from .errors import BudgetExceeded as BudgetExceeded
from .errors import InvalidParameter as InvalidParameter
from .errors import LedgerError as LedgerError
from .errors import TargetUnreachable as TargetUnreachable
from .errors import Unsupported as Unsupported
from .events import ApproximateDP as ApproximateDP
from .events import BinomialTrials as BinomialTrials
from .events import Composed as Composed
from .events import DiscreteGaussian as DiscreteGaussian
from .events import Event as Event
from .events import Gaussian as Gaussian
from .events import Laplace as Laplace
from .events import MatrixMechanism as MatrixMechanism
from .events import OnePass as OnePass
from .events import Poisson as Poisson
from .events import PoissonTrials as PoissonTrials
from .events import PureDP as PureDP
from .events import Relation as Relation
from .events import Repeated as Repeated
from .events import Select as Select
from .events import TruncatedNegativeBinomial as TruncatedNegativeBinomial
from .events import TruncatedPoisson as TruncatedPoisson
from .events import WithoutReplacement as WithoutReplacement
from .events import event_from_json as event_from_json
from .events import event_to_json as event_to_json
from .foreign import from_dp_accounting as from_dp_accounting
from .foreign import from_opacus_history as from_opacus_history
from .ledger import Ledger as Ledger
from .normal_form import atoms_under as atoms_under
from .normal_form import joint_noise_multiplier as joint_noise_multiplier
from .normal_form import normal_form as normal_form
from .privacy_filters import RenyiFilter as RenyiFilter
from .privacy_filters import WorstCaseSchedule as WorstCaseSchedule
from .privacy_filters import ZCDPFilter as ZCDPFilter
from .privacy_filters import best_order as best_order
from .records import Budget as Budget
from .records import PlanRecord as PlanRecord
from .records import Receipt as Receipt
from .records import Spent as Spent
from .rounding import round_up as round_up
from .rounding import round_up_text as round_up_text
from .statement import PlanStatement as PlanStatement
from .statement import Statement as Statement
from .statement import statement as statement
from .trade_off import gaussian_mu as gaussian_mu
from .trade_off import trade_off as trade_off
