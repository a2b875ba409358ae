"""The report of a run: ``RUN/report.html`` and ``RUN/PRIVACY.md``, for people who were not there.

Guarantees:
  * Every epsilon in them comes from the verified ledger (the plots' from its plans) or, where test accuracy is plotted,
    from the records of ``metrics.jsonl``, and stands beside its meaning.
  * What a shareable file says depends on nothing in ``RUN/nonprivate/``. What is not private goes to
    ``RUN/nonprivate/report.html`` alone, and only when asked for.
  * Text of the run (names, caveats, settings) is shown as text and can be nothing else: no markup, no second anchor.

Not promised: that the run did what its ledger says, and that the ledger is the newest one; ``dpkit verify`` and the
anchor are for that.
"""

from .model_card import privacy_md as privacy_md
from .page import Written as Written
from .page import stale as stale
from .page import write_report as write_report
