"""PRIVACY.md: the privacy statement, and a fragment for a model card with the fields that a reader asks for.

The fields are those of Ponomareva et al. 2023, "How to DP-fy ML", section 5.3.3 (https://arxiv.org/abs/2303.00654):
setting, data accesses, final output, unit, relation, accounting, assumptions, formal statement, transparency.

Guarantees: needs no extra; the ledger's anchor stands in it exactly once, as ``entry <sequence>, <64 hex digits>`` on
one line; what came with the run cannot end its line, its list or the code block that it stands in.
"""

from __future__ import annotations

import re

from accounting import Statement, round_up_text
from accounting.statement import NEVER_COVERED
from dpkit import __version__
from dpkit.run_folder import RunFolder

from .plain_words import NOT_COVERED, how_sampled, neighbours, size
from .safe_text import fenced, in_markdown, without_anchor
from .summary import PlanSummary, read_ledger


def privacy_md(run: RunFolder) -> str:
    """The text of ``RUN/PRIVACY.md`` as the ledger stands now.

    Raises:
      RunFolderError: there is no such folder, or the run was trained without privacy.
      LedgerError: the ledger is missing or cannot be trusted.
    """
    return render(*read_ledger(run))


def render(stated: Statement, plans: tuple[PlanSummary, ...]) -> str:
    """The text for what :func:`dpkit.report.summary.read_ledger` returned."""
    parts = ["# Privacy statement", fenced(_statement(stated))]
    if plans:
        parts += [
            "## Differential privacy",
            "<!-- A fragment for a model card; the fields are those of https://arxiv.org/abs/2303.00654, 5.3.3. -->",
            "\n".join(_card(stated, plans)),
            *(["**Caveats**", "\n".join(caveats)] if (caveats := _caveats(stated)) else []),
            "**Not covered**",
            "\n".join(_not_covered(stated)),
        ]
    return "\n\n".join(parts) + "\n"


def _statement(stated: Statement) -> str:
    """The statement with its anchor, and no other, on one line."""
    digest = stated.anchor_digest
    text = re.sub(rf"\s*ledger anchor: entry {stated.anchor_sequence},\s+{digest}\s*\Z", "", str(stated))
    return f"{without_anchor(text, ';')}\n  ledger anchor: entry {stated.anchor_sequence}, {digest}"


def _card(stated: Statement, plans: tuple[PlanSummary, ...]) -> list[str]:
    unit = in_markdown(stated.unit)
    relation = plans[0].record.relation
    fields = {
        "Setting": "central differential privacy: whoever trains sees the data and is trusted.",
        "Data": f"{in_markdown(stated.dataset_name)}; {'; '.join(dict.fromkeys(size(plan.record) for plan in plans))}.",
        "Data accesses covered": (
            f"the {stated.data_accesses} training steps that the ledger was charged for. Not covered unless the ledger "
            "was charged for it: hyperparameter search, feature selection, evaluation."
        ),
        "Final output": "the released model, every checkpoint and every metric that was computed from them on other "
        "data. Not the files under `nonprivate/`.",
        "Unit of privacy": f"one {unit}.",
        "Neighbouring relation": f"{in_markdown(stated.relation)}: what was released would be almost as likely if "
        f"{neighbours(relation, unit)}.",
        "Accounting": f"{in_markdown(stated.accountant)}; an upper bound, rounded up.",
        "Assumptions": _assumptions(stated, plans),
        "Formal statement": _formal(stated),
        "Size and delta": " ".join(_delta(plan) for plan in plans),
        "Randomness": _randomness(plans),
        "Transparency": _transparency(stated, plans),
        "Certified": f"{'yes' if stated.certified else '**NO**'} ({in_markdown(stated.certified_reason)}).",
    }
    return [f"- **{name}:** {text}" for name, text in fields.items()]


def _assumptions(stated: Statement, plans: tuple[PlanSummary, ...]) -> str:
    met = (
        "dpkit draws the batches, clips, and adds the noise itself, as the accounting assumes"
        if stated.certified
        else "the run is NOT certified, so the assumptions are not known to be met"
    )
    caveats = [c for c in stated.caveats if c.startswith("Assumed: ")]
    unchecked = "".join(f" Not checked: {in_markdown(caveat.removeprefix('Assumed: '))}" for caveat in caveats)
    return f"sampling: {in_markdown(how_sampled(plans))}; {met}.{unchecked}"


def _formal(stated: Statement) -> str:
    delta = round_up_text(stated.delta)
    condition = "" if stated.certified else "If the run were certified: "
    now = f"{condition}({stated.epsilon:.4f}, {delta})-differentially private at the steps charged so far"
    return (
        f"{now}; ({stated.committed_epsilon:.4f}, {delta}) at all planned steps, which is the guarantee if a run was "
        "stopped because of what was seen."
    )


def _delta(plan: PlanSummary) -> str:
    delta, n = round_up_text(plan.record.delta), plan.record.num_examples
    if plan.delta_is_too_large:
        return (
            f"**WARNING:** delta = {delta} is not below 1/N = {1 / n:.3g}; publishing one unit at random would "
            "satisfy such a delta."
        )
    return f"delta = {delta} is {1 / (plan.record.delta * n):.3g} times smaller than 1/N = {1 / n:.3g}."


def _randomness(plans: tuple[PlanSummary, ...]) -> str:
    found = dict.fromkeys((plan.stated.noise_tier, plan.stated.noise_generator) for plan in plans)
    made = "; ".join(f"{in_markdown(generator)} (noise tier {in_markdown(tier)})" for tier, generator in found)
    return f"{made}. What that leaves open is said below."


def _transparency(stated: Statement, plans: tuple[PlanSummary, ...]) -> str:
    versions = [f"{name} {plan.fact(f'{name}_version')}" for plan in plans for name in ("dpkit", "torch")]
    known = ", ".join(dict.fromkeys(version for version in versions if not version.endswith(" None")))
    written = f"this text by dpkit {__version__}"
    trained = f"trained with {in_markdown(known)}; " if known else ""
    # The digest is cut: the whole anchor stands in the statement, and once.
    return (
        f"{trained}{written}; ledger of {stated.anchor_sequence + 1} entries, digest {stated.anchor_digest[:16]}...; "
        "`dpkit verify RUN` checks it."
    )


def _caveats(stated: Statement) -> list[str]:
    own = [c for c in stated.caveats if not c.startswith(("Assumed: ", "Not covered: "))]
    return [f"- {in_markdown(caveat)}" for caveat in own]


def _not_covered(stated: Statement) -> list[str]:
    own = [
        caveat.removeprefix("Not covered: ")
        for caveat in stated.caveats
        if caveat.startswith("Not covered: ") and caveat not in NEVER_COVERED  # plain_words has those
    ]
    general = [f"- **{title}.** {text}" for title, text in NOT_COVERED]
    return general + [f"- {in_markdown(caveat[:1].upper() + caveat[1:])}" for caveat in own]
