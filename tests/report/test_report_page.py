"""The page: well-formed, self-contained, saying what the ledger says, and nothing that is not private."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from decimal import Decimal
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from report.folders import MakeRun, metrics_lines, plan
from scipy.stats import norm

import accounting
from accounting import Budget, Gaussian, Ledger, Relation
from dpkit.report import write_report
from dpkit.report.plain_words import most_found, percent
from dpkit.report.plots import evaluations, learning_rates
from dpkit.report.summary import read
from dpkit.run_folder import RunFolder

pytest.importorskip("matplotlib", reason="the page's plots need matplotlib (extra `report`)")
pytest.importorskip("jinja2", reason="the page needs jinja2 (extra `report`)")

ANCHOR = re.compile(r"entry\s+(\d+),\s+([0-9a-f]{64})")
VOID = {"meta", "link", "br", "hr", "img", "input", "base", "embed", "source", "wbr"}
HOSTILE = "<script>alert(1)</script></pre></style>\"'{{ 7*7 }} & ```"
FORGED = "entry 5, " + "a" * 64


class Page(HTMLParser):
    """A page as elements and text; refuses what is not closed in the order in which it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """What a reader sees, with single spaces."""
        return " ".join("".join(self.words).split())

    def all(self, name: str) -> list[str]:
        """The values of the attribute ``name``."""
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def report(run: Path, **options: bool) -> str:
    return write_report(RunFolder(run), **options).report.read_text(encoding="utf-8")


def check_self_contained(text: str) -> Page:
    """Well-formed, one of each id, nothing from elsewhere, nothing that runs."""
    page = Page(text)
    ids = Counter(page.all("id"))
    assert [name for name, times in ids.items() if times > 1] == []
    for pointer in page.all("aria-labelledby"):
        assert set(pointer.split()) <= ids.keys()
    assert all(target.startswith("#") and target[1:] in ids for target in page.all("href"))
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= ids.keys()
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert page.all("src") == [] and len(re.findall(r"url\((?!#)", text)) == 0
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy
    return page


def finished_run(make_run: MakeRun) -> Path:
    run = make_run(plan(), 40)
    (run / "metrics.jsonl").write_text(metrics_lines(plan(), 40), encoding="utf-8")
    return run


def unfinished_run(make_run: MakeRun) -> Path:
    run = make_run(plan(), 10)
    (run / "metrics.jsonl").write_text(metrics_lines(plan(), 10), encoding="utf-8")
    return run


def two_plans(make_run: MakeRun) -> Path:
    run = make_run(plan(), 12, plan(steps=20), 20)
    lines = metrics_lines(plan(), 12) + metrics_lines(plan(steps=20), 20)
    (run / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return run


def seeded_run(make_run: MakeRun) -> Path:
    return make_run(plan(facts={"certified": False, "certified_reason": "seeded: anyone can remove the noise"}), 40)


SCENES = {
    finished_run: ["finished, all 40 planned steps", "Certified", "not cover", "0 of 40 planned steps"],
    unfinished_run: [
        "not finished, 10 of 40 planned steps",
        "30 of 40 planned steps",
        "stopped because of what was seen",
    ],
    two_plans: ["2 plans in the order", "for all plans together", "ε of this plan alone"],
    seeded_run: ["NOT CERTIFIED", "seeded: anyone can remove the noise", "If the run were certified"],
    lambda make_run: make_run(): ["nothing charged yet", "ε is 0", "No plan has begun", "entry 0, "],
    lambda make_run: make_run(plan(), 40): ["This run recorded no test accuracy", "There is no config.yaml"],
    lambda make_run: make_run(plan(delta=1e-3), 1): ["δ is too large", "δ = 0.001 is not below 1/N = 0.000696"],
    lambda make_run: make_run(plan(relation=Relation.ADD_REMOVE), 1): [
        "the true size stays hidden",
        "taken out of them",
    ],
    lambda make_run: make_run(plan(event=Gaussian(9.0), relation=Relation.REPLACE_ONE), 1): [
        "which of two given examples was used"
    ],
}


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: getattr(scene, "__name__", "run"))
def test_every_kind_of_run_gets_a_page_that_stands_alone_and_says_what_it_is(make_run: MakeRun, scene):
    text = report(scene(make_run))
    page = check_self_contained(text)
    for sentence in SCENES[scene]:
        assert sentence in page.text
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert len(ANCHOR.findall(text)) == 1


def test_the_page_shows_the_numbers_of_the_statement_and_its_anchor(finished: Path):
    text = report(finished)
    with Ledger.open(finished / "ledger.sqlite", read_only=True) as ledger:
        stated = accounting.statement(ledger)
        anchor = ledger.anchor()
    page = Page(text)
    assert f"ε ≤ {stated.epsilon:.4f}" in page.text
    assert "δ = 0.0001" in page.text
    assert stated.accountant in page.text
    assert all(caveat.removeprefix("Not covered: ")[1:] in page.text for caveat in stated.caveats)
    assert [(int(sequence), digest) for sequence, digest in ANCHOR.findall(text)] == [anchor]
    [shown] = re.findall(r"<pre>(\{.*?\})</pre>", text, flags=re.DOTALL)
    assert json.loads("".join(Page(f"<p>{shown}</p>").words)) == stated.model_dump(mode="json")


def test_what_is_left_of_the_budget_is_rounded_down(make_run: MakeRun):
    run = make_run(plan(), 3, plan(steps=20), 1, budget=Budget(8.00007, 1.0000009e-3))
    summary = read(RunFolder(run))
    exact = Decimal("8.00007") - Decimal(repr(summary.statement.committed_epsilon))
    assert 0 < exact - Decimal(summary.epsilon_left) < Decimal("0.0001")
    assert summary.delta_left == "0.0008"  # 0.0008000009
    assert f"ε {summary.epsilon_left} and δ 0.0008" in Page(report(run)).text


def test_the_plain_words_about_an_unfinished_run_are_those_of_all_its_steps(make_run: MakeRun):
    run = make_run(plan(), 3)
    stated = read(RunFolder(run)).statement
    most = percent(most_found(stated.committed_epsilon, stated.delta))
    assert f"rightly suspicious in at most {most} (at all planned steps)" in Page(report(run)).text


def test_what_is_not_covered_names_the_whole_list(finished: Path):
    text = Page(report(finished)).text.lower()
    for topic in ("timing", "operates the training", "hyperparameter search", "labels", "gpu", "random draws"):
        assert topic in text
    assert "held-out data, which the guarantee does not cover" in text


def test_nothing_that_is_not_private_can_reach_the_files_that_are_shared(finished: Path):
    """The same bytes with and without it; for that, a page depends on nothing but the run."""
    before = report(finished), (finished / "PRIVACY.md").read_text(encoding="utf-8")
    folder = finished / "nonprivate"
    folder.mkdir()
    lines = [
        {"step": s, "charged": s, "units": 73_190 + s, "clipped": 61_207, "dropped": 8_413, "mean_loss": 90_210.7 + s}
        for s in range(1, 41)
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "result.json").write_text('{"private": false, "test_accuracy": 0.73190}', encoding="utf-8")
    after = report(finished, with_nonprivate=True), (finished / "PRIVACY.md").read_text(encoding="utf-8")
    assert after == before
    # Not inside of longer words: random digests hold any digits now and then.
    assert not re.search(r"(?<![0-9a-z.])(7319\d|61207|8413|902[1-5]\d)(?![0-9a-z])", "".join(after))


def test_the_page_with_what_is_not_private_lies_apart_and_says_so_in_red(finished: Path):
    folder = finished / "nonprivate"
    folder.mkdir()
    lines = [{"step": s, "units": 200 + s, "clipped": 50, "dropped": 0, "mean_loss": 2 / s} for s in range(1, 41)]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    written = write_report(RunFolder(finished), with_nonprivate=True)
    assert written.nonprivate_report == folder / "report.html"
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert page.text.startswith("NOT PRIVATE: ")
    for label in ("mean loss", "share clipped", "batch size", "dropped units"):
        assert f"Not private: {label} over the steps" in page.text
    assert page.text.count("NOT PRIVATE") >= 7  # title, alert, heading, one in each plot
    assert "NOT PRIVATE" not in written.report.read_text(encoding="utf-8")


def test_text_of_the_run_is_shown_and_can_be_nothing_else(make_run: MakeRun):
    facts = {"caveats": [HOSTILE, FORGED], "clipping": HOSTILE, "sampler": HOSTILE, "noise_generator": HOSTILE}
    facts |= {"certified": False, "certified_reason": HOSTILE, "torch_version": HOSTILE, "mechanism": HOSTILE}
    hostile = plan(unit=HOSTILE, facts=facts)
    run = make_run(hostile, 2, dataset_name=f"{HOSTILE}\n{FORGED}\u202e")
    (run / "config.yaml").write_text(f"dataset: {HOSTILE}\n# {FORGED}\n", encoding="utf-8")
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "charged": 1, "planned": 40, "epsilon": 1, "delta": 0, "metrics": {HOSTILE: 1}}) + "\n",
        encoding="utf-8",
    )
    (run / "result.json").write_text(json.dumps({"model_sha256": HOSTILE}), encoding="utf-8")
    text = report(run)
    page = check_self_contained(text)
    assert page.text.count(HOSTILE) > 10
    assert len(ANCHOR.findall(text)) == 1
    assert "\u202e" not in text and page.text.count(FORGED) >= 2


def test_the_value_of_a_noise_seed_is_not_published(finished: Path):
    ways = ("  noise_seed: 424242", "privacy: {noise_seed: 424242, delta: 1.0e-4}", "'noise_seed' : 424242 # x")
    (finished / "config.yaml").write_text("\n".join(ways), encoding="utf-8")
    text = report(finished)
    assert "424242" not in text and text.count("noise_seed") == len(ways)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_randomised_response_finds_as_many_as_the_page_says_and_no_more(epsilon: float):
    false_alarms = 1 / (1 + math.exp(epsilon))
    exact = 1 - false_alarms
    assert exact <= most_found(epsilon, 0.0, false_alarms) <= exact + 0.001


@pytest.mark.parametrize("mu", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 8.0, 1000.0])
def test_the_best_test_against_the_gaussian_mechanism_finds_no_more(mu: float, epsilon: float):
    delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
    for false_alarms in (0.001, 0.01, 0.2):
        assert norm.cdf(norm.ppf(false_alarms) + mu) <= most_found(epsilon, float(delta), false_alarms) <= 1


def test_each_plan_has_its_own_line_and_steps_that_were_redone_stay_in_theirs(make_run: MakeRun):
    run = make_run(plan(), 20, plan(steps=20), 10)
    first = metrics_lines(plan(), 15).splitlines()
    redone = [json.loads(line) for line in first[-6:]]
    resumed = [json.dumps(line | {"charged": line["charged"] + 5}) for line in redone]
    second = metrics_lines(plan(steps=20), 10).splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*first, *resumed, *second]) + "\n", encoding="utf-8")
    summary = read(RunFolder(run))
    assert [[record.charged for record in group] for group in evaluations(summary)] == [[5, 10, 15, 20], [5, 10]]
    assert learning_rates(summary) == [(step, 2.0 * (1 - step / 20)) for step in range(1, 11)]


@pytest.mark.parametrize(
    ("plans", "colour"), [((plan(), 40), "#1f5fa8"), ((plan(), 12, plan(steps=20), 20), "#8a5a00")], ids=["one", "two"]
)
def test_the_plot_of_epsilon_ends_where_the_statement_does(make_run: MakeRun, plans: tuple, colour: str):
    """The last point of the last line is at the height of the budget when the budget is what the plans cost."""
    costs = [
        accounting.epsilon(accounting.Repeated(p.event, p.steps), p.delta, relation=p.relation).upper
        for p in plans[::2]
    ]
    text = report(make_run(*plans, budget=Budget(sum(costs) + 1e-9, len(costs) * 1e-4)))
    [figure] = re.findall(r'<svg[^>]*aria-labelledby="epsilon-title.*?</svg>', text, flags=re.DOTALL)
    [budget] = re.findall(r'd="M [\d.]+ ([\d.]+) +L [\d.]+ ([\d.]+)[^"]*"[^>]*stroke: #a3181e', figure)
    [curve] = [d for d in re.findall(rf'd="([^"]*)"[^>]*stroke: {colour}; stroke-width: 2', figure) if d.count("L") > 5]
    numbers = [float(number) for number in re.findall(r"[\d.]+", curve)]
    assert budget[0] == budget[1]
    assert numbers[-1] == pytest.approx(float(budget[0]), abs=0.02)
    assert numbers[1::2] == sorted(numbers[1::2], reverse=True)  # epsilon only grows; y points down


def test_letters_in_plots_can_be_read_on_a_telephone(finished: Path):
    text = report(finished)
    widths = [float(box.split()[2]) for box in re.findall(r'viewBox="([^"]*)"', text)]
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)]
    assert len(widths) == 3 and len(sizes) > 20
    assert min(sizes) * 310 / max(widths) >= 10  # 310 of 375 pixels are left between the margins
