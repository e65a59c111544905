"""The report: complete, self-contained, accessible, and readable in a browser."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
from browser import check, look, needs_browser

from compactmlip.validate.nve import Trace
from compactmlip.validate.parity import parity
from compactmlip.validate.report import build_report
from compactmlip.validate.report.formats import (
    file_size,
    integer,
    limit,
    number,
    plus_minus,
    r_squared,
    signed,
    times,
)

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects what the tests look at, and refuses tags that are closed in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, (tag, self._open[-3:], self.getpos())
        self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "svg"):
            self.text.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def html(evidence):
    return build_report(*evidence())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_nothing_is_loaded_from_elsewhere(html, page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            target = attributes.get(name, "#")
            assert target.startswith(("#", "data:")), (tag, target)
        assert tag not in ("script", "link", "iframe", "object")
    assert "@import" not in html
    outside = [u for u in re.findall(r"url\(([^)]*)\)", html) if not u.startswith("#")]
    assert outside == []
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # namespaces, not links
    assert set(re.findall(r"https?://[^\s\"'<>]+", html)) <= names


def test_figures_are_inside_and_described(page):
    figures = page.all("svg")
    assert [f["class"] for f in figures] == [
        "figure-energy",
        "figure-forces",
        "figure-stress",
        "figure-nve",
        "figure-speed",
    ]
    for figure in figures:
        assert figure["role"] == "img" and len(figure["aria-label"]) > 20 and "viewbox" in figure
    assert len(page.all("figcaption")) == len(page.all("figure")) == 5
    assert all(image.get("alt") for image in page.all("img"))


def test_ids_are_unique_and_references_lead_somewhere(html, page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {a[n][1:] for _, a in page.tags for n in ("xlink:href", "href") if a.get(n, "").startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", html))
    wanted |= {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert wanted and wanted <= set(ids)


def test_structure_for_readers_and_machines(page):
    assert page.all("html")[0]["lang"] == "en"
    assert any("width=device-width" in a.get("content", "") for a in page.all("meta"))
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings.count(1) == 1 and headings[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    scrolls = [a for a in page.all("div") if a.get("class", "").startswith("scroll")]
    assert len(scrolls) == len(page.all("table")) + 1 == 6  # tables and the energy trace
    assert all(a["tabindex"] == "0" and (a.get("aria-label") or a["aria-labelledby"]) for a in scrolls)


def test_regions_are_not_named_as_their_sections():
    """In any section, also those that this certificate does not fill: both are landmarks."""
    folder = resources.files("compactmlip.validate.report")
    for name in ("report.html.j2", "dynamics.html.j2", "finetuning.html.j2"):
        text = folder.joinpath(name).read_text(encoding="utf-8")
        regions = re.findall(r'aria-label="([^"]+)"', text)
        sections = re.findall(r"<h2[^>]*>([^<]+)</h2>", text) + re.findall(
            r'begin\("[^"]+", "([^"]+)"\)', text
        )
        assert len(sections) > 4 and len(regions) == len(set(regions))
        plain = {title.replace('"validation" if table.name == "valid" else ', "") for title in sections}
        assert regions and not set(regions) & plain, name


def test_numbers_of_the_certificate_are_shown(evidence, page):
    certificate, _ = evidence()
    words = page.words
    for value in (
        certificate.parity.energy.mae,
        certificate.parity.forces.mae,
        certificate.parity.forces.rmse,
        certificate.parity.forces_by_species["O"].maximum,
        certificate.parity.stress.mae,
        certificate.nve.drift.fluctuation,
        certificate.consistency.derivative_forces,
    ):
        assert number(value) in words, value
    for text in ("98,304", "1,170,000", "51", "1,820", "compensated", "72.1", "812.3 kB", "Test CPU", "MIT"):
        assert text in words, text
    assert certificate.model.sha256 in words and certificate.teacher.citation in words
    assert words.count(" pass ") >= len(certificate.checks)
    assert "35× at 64 atoms" in words  # the teacher has no number at 216


def test_text_from_files_is_escaped(html):
    assert "big &lt;teacher&gt;" in html and "a &amp; b" in html and "<teacher>" not in html


def test_failure_is_said_first(evidence):
    certificate, data = evidence(swirl=0.02)
    words = Page(build_report(certificate, data)).words
    assert certificate.verdict == "fail"
    start = r"fail 7 of 9 checks passed, 2 failed\. Do not use this file .* fail energy drift"
    assert re.search(start, words), words[:400]
    table = words[words.index("fails above") :]
    assert table.index(" fail ") < table.index(" pass ") and table.rindex(" fail ") < table.index(" pass ")


def test_without_stress_and_without_dynamics(evidence):
    certificate, data = evidence(stress=False)
    none = Trace(*(np.zeros(0),) * 4)
    nve = certificate.nve.model_copy(
        update={
            "steps": 0,
            "stable": False,
            "drift": None,
            "reason": "it <exploded>.",
            "mean_temperature_K": np.nan,
        }
    )
    changed = certificate.model_copy(update={"nve": nve, "teacher_nve": None, "speed": (), "stages": ()})
    text = build_report(changed, type(data)(data.frames, data.reference, data.predicted, none, None))
    page = Page(text)
    assert [f["class"] for f in page.all("svg")] == ["figure-energy", "figure-forces"]
    assert "it &lt;exploded&gt;." in text and "Nothing can be said about dynamics" in text
    assert "nan" not in page.words.lower().split()


def test_teacher_is_compared_with_labels_that_are_not_its_own(evidence):
    certificate, data = evidence()
    given = {"origin": "given", "reference": "labels"}
    heldout = certificate.heldout.model_copy(update={**given, "seed": None, "species_not_seen": ("O",)})
    changed = certificate.model_copy(update={"teacher_parity": certificate.parity, "heldout": heldout})
    words = Page(build_report(changed, data)).words
    assert "the teacher against the same reference" in words and "The model covers O, which" in words
    assert "Errors are relative to the teacher" not in words

    exact = parity(data.frames, data.reference, data.reference)
    own = Page(build_report(changed.model_copy(update={"teacher_parity": exact}), data)).words
    assert "The labels are the teacher's own" in own and "Errors are relative to the teacher" in own
    assert "the teacher against the same reference" not in own


def test_errors_by_kind_of_structure(evidence, html):
    certificate, data = evidence()
    assert "kind-errors" not in html
    for k, atoms in enumerate(frames := [a.copy() for a in data.frames]):
        atoms.info["config_type"] = "a & b" if k % 2 else "md"
    found = parity(frames, data.reference, data.predicted)
    text = build_report(certificate.model_copy(update={"parity": found}), data)
    assert "kind-errors" in text and "a &amp; b" in text
    assert number(found.by_kind["md"].forces) in Page(text).words


def test_same_input_same_report(evidence, html):
    assert build_report(*evidence()) == html


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.23456, "1.23"),
        (-0.012345, "−0.0123"),
        (12345.6, "12,300"),
        (0.9999, "1.00"),
        (2.5e-7, "2.50 × 10⁻⁷"),
        (None, "–"),
        (float("nan"), "not finite"),
    ],
)
def test_numbers_for_people(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-1.06e-5, 6.1e-4, "0.0000 ± 0.0006"),
        (0.12345, 0.0234, "+0.12 ± 0.02"),
        (-0.12345, 0.00097, "−0.123 ± 0.001"),
        (12.3, 20.0, "+12 ± 20"),
        (1.0, 0.0, "1.00 ± 0"),
        (float("nan"), 1.0, "not finite ± 1.00"),
    ],
)
def test_value_and_error_share_their_last_digit(value, error, text):
    assert plus_minus(value, error) == text


def test_other_formats():
    assert (limit(5.0), limit(0.2099), limit(None)) == ("5", "0.21", "–")
    assert (signed(0.5), signed(-0.5)) == ("+0.500", "−0.500")
    assert (integer(1234567), integer(2.25), integer(None)) == ("1,234,567", "2.25", "–")
    assert (file_size(999), file_size(2_500_000)) == ("1.0 kB", "2.5 MB")
    assert (r_squared(0.99995), r_squared(0.9912), r_squared(None)) == ("> 0.9999", "0.9912", "–")
    assert (times(9.87), times(123.4), times(None)) == ("9.9×", "123×", "–")


@needs_browser
def test_in_a_browser(evidence, html, tmp_path):
    """Loads by itself, fits narrow and wide windows, and is accessible, in light and dark."""
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    (tmp_path / "bad.html").write_text(build_report(*evidence(swirl=0.02)), encoding="utf-8")
    check(tmp_path / "report.html")
    check(tmp_path / "bad.html", [(360, "dark")])


@needs_browser
def test_the_browser_sees_what_is_wrong(html, tmp_path):
    """A script that fails, something from elsewhere, a picture without text, a line too long to fit."""
    broken = html.replace("<main>", "<main><img src='missing.png'><script>nonsense()</script>")
    broken = broken.replace("<main>", f"<main><pre>{'x' * 400}</pre>")
    path = tmp_path / "report.html"
    path.write_text(broken, encoding="utf-8")
    (found,) = look(path, ((360, "light"),))
    assert any("nonsense" in message for message in found.messages)
    assert len(found.requests) == 1 and found.requests[0].endswith("missing.png")
    assert any(violation.startswith("image-alt") for violation in found.violations) and found.width > 360
