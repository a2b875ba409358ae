"""Every error that accounting raises.

AccountingError
├── InvalidParameter     a number outside its domain (also a ValueError)
├── Unsupported          no theorem here covers this event under this relation
├── TargetUnreachable    no noise reaches the wanted epsilon
├── LedgerError          the ledger is missing, corrupt, locked, or of another data set: no training, no epsilon
└── BudgetExceeded       the charge would go over the ledger's budget; nothing was charged
"""


class AccountingError(Exception):
    """Base of all errors of this package."""


class InvalidParameter(AccountingError, ValueError):
    """A number lies outside its domain."""


class Unsupported(AccountingError):
    """No theorem implemented here covers the event under the stated relation."""


class TargetUnreachable(AccountingError):
    """No noise multiplier reaches the target epsilon."""


class LedgerError(AccountingError):
    """The ledger cannot be trusted or reached. Training and reporting stop."""


class BudgetExceeded(AccountingError):
    """A charge would exceed the budget. Nothing was charged."""
