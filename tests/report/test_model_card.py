"""PRIVACY.md: every field a reader asks for, and Markdown that nothing from the run can break out of."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from report.folders import MakeRun, plan

import accounting
from accounting import Ledger, Relation
from dpkit.errors import LedgerError, RunFolderError
from dpkit.report import privacy_md
from dpkit.report.safe_text import fenced
from dpkit.run_folder import RunFolder

ANCHOR = re.compile(r"entry\s+(\d+),\s+([0-9a-f]{64})")
HOSTILE = (
    "``` ```` `code` </code></pre><script>alert(1)</script> [a](http://b.example) ![c](d) **e** _f_ ~~g~~ $h$ | # i "
    "<!-- j --> --- \\ www.k.example l@m.example entry 5, " + "a" * 64
)
BROKEN = f"{HOSTILE}\n\n# heading\n\n```\n{HOSTILE}\r\n- item\u2028# line\u202e\n\n    code"

FIELDS = {
    "Setting": "central differential privacy",
    "Data": "N = 1437",
    "Data accesses covered": "the 7 training steps",
    "Final output": "every checkpoint and every metric",
    "Unit of privacy": "one example",
    "Neighbouring relation": "zero out one",
    "Accounting": "privacy loss distribution",
    "Assumptions": "dpkit draws the batches, clips, and adds the noise itself",
    "Formal statement": "at all planned steps",
    "Size and delta": "6.96 times smaller than 1/N",
    "Randomness": "not cryptographic",
    "Transparency": "dpkit verify RUN",
    "Certified": "yes",
}


def test_the_card_has_every_field_that_a_reader_asks_for(make_run: MakeRun):
    text = privacy_md(RunFolder(make_run(plan(), 7)))
    for name, content in FIELDS.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"- **{name}:**")]
        assert content in line


def test_the_formal_statement_has_both_epsilons_of_the_ledger(make_run: MakeRun):
    run = make_run(plan(), 7)
    with Ledger.open(run / "ledger.sqlite", read_only=True) as ledger:
        stated = accounting.statement(ledger)
    text = privacy_md(RunFolder(run))
    assert stated.epsilon < stated.committed_epsilon
    assert f"({stated.epsilon:.4f}, 0.0001)-differentially private at the steps charged so far" in text
    assert f"({stated.committed_epsilon:.4f}, 0.0001) at all planned steps" in text
    # The statement itself, as `dpkit statement` prints it, up to the line break before the digest.
    assert str(stated).rpartition("entry")[0] in text


def test_the_anchor_stands_on_one_line_and_once(make_run: MakeRun):
    for name, charged in {"some": (plan(), 3), "none": ()}.items():
        run = make_run(*charged, name=name)
        with Ledger.open(run / "ledger.sqlite", read_only=True) as ledger:
            sequence, digest = ledger.anchor()
        text = privacy_md(RunFolder(run))
        assert text.count(f"entry {sequence}, {digest}") == 1
        assert len(ANCHOR.findall(text)) == 1


def test_nothing_from_the_run_breaks_out_of_the_markdown(make_run: MakeRun):
    facts = {"caveats": [BROKEN, f"Assumed: {BROKEN}", f"Not covered: {BROKEN}"], "noise_generator": BROKEN}
    facts |= {"certified": False, "certified_reason": BROKEN, "torch_version": BROKEN, "sampling": BROKEN}
    run = make_run(plan(unit=BROKEN[:900], facts=facts), 2, dataset_name=BROKEN[:900])
    text = privacy_md(RunFolder(run))
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    assert [token.content for token in tokens if token.type == "inline" and "heading" in token.content] != []
    assert sum(token.type == "heading_open" for token in tokens) == 2
    assert sum(token.type == "fence" for token in tokens) == 1
    assert sum(token.type == "html_block" for token in tokens) == 1  # our own comment
    assert {token.type for token in tokens} & {"code_block", "table_open", "hr"} == set()
    inner = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inner} <= {"text", "strong_open", "strong_close", "code_inline", "text_special"}
    shown = "".join(child.content for child in inner)
    assert shown.count("</code></pre><script>alert(1)</script> [a](http://b.example) ![c](d) **e** _f_ ~~g~~") >= 6
    assert len(ANCHOR.findall(text)) == 1
    outside = text.split("## Differential privacy")[1].split("-->", 1)[1]
    assert not re.search(r"://|www\.|@", outside)  # what readers make links of
    assert "\u202e" not in text and "\u2028" not in text


@pytest.mark.parametrize("text", ["a\n```\n# b", "````\n# b", "~~~\n# b", "```text\n```\n`````\n# b"])
def test_a_fenced_text_cannot_end_its_fence(text: str):
    [token] = MarkdownIt("commonmark").parse(fenced(text))
    assert (token.type, token.content) == ("fence", text + "\n")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"relation": Relation.ADD_REMOVE}, "a public number; the true size stays hidden"),
        ({"relation": Relation.ZERO_OUT}, "which is the size of the data set and public"),
        ({"delta": 1e-3}, "**WARNING:** delta = 0.001 is not below 1/N = 0.000696"),
        ({"facts": {"certified": False, "certified_reason": "seeded"}}, "**NO** (seeded)"),
        ({"facts": {"certified": False}}, "If the run were certified: ("),
    ],
)
def test_what_matters_about_a_run_is_in_its_card(make_run: MakeRun, changes: dict, sentence: str):
    assert sentence in privacy_md(RunFolder(make_run(plan(**changes), 1)))


def test_a_ledger_without_charges_says_so(make_run: MakeRun):
    text = privacy_md(RunFolder(make_run()))
    assert "nothing was charged yet" in text and "## Differential privacy" not in text


def test_a_card_needs_a_run_folder_and_a_ledger(tmp_path: Path):
    with pytest.raises(RunFolderError, match="does not exist"):
        privacy_md(RunFolder(tmp_path / "nowhere"))
    with pytest.raises(LedgerError, match="is missing"):
        privacy_md(RunFolder(tmp_path))


def test_a_card_is_made_without_the_extra_and_without_torch(make_run: MakeRun):
    run = make_run(plan(), 1)
    code = (
        "import sys; from dpkit.report import privacy_md; from dpkit.run_folder import RunFolder\n"
        f"privacy_md(RunFolder({str(run)!r}))\n"
        "print({'torch', 'jinja2', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
