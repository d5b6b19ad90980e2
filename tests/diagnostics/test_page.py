"""The report as a file: complete, self-contained, and safe with any parameter name."""

import base64
import html.parser
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.diagnostics import check
from sbi_flows.prior.prior import as_prior

HOSTILE = "<script>alert('x')</script>&\"$\\foo$ --><b>"
UNICODE = "β_减速_é"
SIZES = {"datasets": 120, "draws": 50, "progress": False}
VOID = {"meta", "img", "br"}


class Parsed(html.parser.HTMLParser):
    """HTML parser that collects tags, loaded resources, alternative texts and plain text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.loads, self.alts, self.words = [], set(), [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [v for k, v in attrs if k in {"src", "href", "srcset", "data", "action"}]
        self.alts += [v for k, v in attrs if k == "alt"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def report(gaussian):
    """Report of a narrow posterior with hostile parameter names and failing simulations."""
    prior = as_prior({HOSTILE: dist.Normal(0, 1), UNICODE: dist.Normal(0, 1)})

    def failing(key, theta):
        x = jnp.stack([theta[HOSTILE], theta[UNICODE]]) + 0.5 * jax.random.normal(key, (2,))
        return jnp.where(jax.random.uniform(jax.random.fold_in(key, 1)) < 0.2, jnp.nan, x)

    with pytest.warns(SbiFlowsWarning, match="of 120 simulations failed"):
        return check(jax.random.key(3), gaussian(prior=prior, scale=0.5), failing, **SIZES)


@pytest.fixture(scope="module")
def text(report, tmp_path_factory):
    path = report.save(tmp_path_factory.mktemp("page") / "check.html")
    assert [p.name for p in path.parent.iterdir()] == ["check.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(text):
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    parsed = Parsed(text)
    assert parsed.open == []
    assert len(parsed.loads) == 3 == len(parsed.alts) and all(parsed.alts)
    assert all(v.startswith("data:image/svg+xml;base64,") for v in parsed.loads)
    assert not re.search(r"url\(|@import|https?:", text)
    assert len(text) < 400_000


def test_the_page_has_all_that_was_found(report, text):
    words = "".join(Parsed(text).words)
    assert report.verdict in words and "over-confident" in report.verdict
    assert f"{report.num_failed} simulations failed and were left out" in words
    assert f"{report.num_datasets} data sets, 50 draws" in words
    assert report.command in words
    for title in ("All tests", "Ranks of", "Coverage", "(TARP)", "Sharpness", "To repeat"):
        assert title in words
    for name in ("python", "jax", "numpyro", "sbi-flows", "platform"):
        assert name in words
    assert f"{report.sharpness.contraction[0]:.2f}" in words


def test_no_name_acts_on_the_page(text):
    parsed = Parsed(text)
    assert not parsed.seen & {"script", "b", "svg", "iframe"}
    assert HOSTILE in "".join(parsed.words) and UNICODE in "".join(parsed.words)
    for source in parsed.loads:
        picture = base64.b64decode(source.split(",")[1]).decode()
        assert "<script" not in picture and picture.rstrip().endswith("</svg>")
    first = base64.b64decode(parsed.loads[0].split(",")[1]).decode()
    assert UNICODE in first  # as text, in the reader's fonts


def test_the_same_report_is_the_same_page(report, text):
    assert report.to_html() == text


def test_colours_can_be_read(text):
    """Contrast is at least 4.5 to 1 (WCAG 2), on light and on dark background."""

    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in text.split("@media")[:2]
    )
    for colours in (light, dark):
        paper = luminance(colours.pop("paper"))
        for name in ("ink", "soft", "good", "bad"):
            high, low = sorted([paper, luminance(colours[name])], reverse=True)
            assert (high + 0.05) / (low + 0.05) > 4.5, name


def test_the_command_gives_the_same_key(report):
    names = {}
    exec(report.command.split("report =")[0], names)
    key = jax.random.key_data(names["key"])
    np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(3)))
    assert "datasets=120, draws=50, level=0.05" in report.command


def test_numbers_as_strict_json(report, tmp_path):
    path = report.save(str(tmp_path / "check.json"))

    def refuse(name):
        raise AssertionError(name)

    stored = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert stored["verdict"] == report.verdict and stored["command"] == report.command
    assert stored["num_failed"] == report.num_failed
    assert UNICODE in stored["sharpness"] and "jax" in stored["versions"]


def test_a_file_is_replaced_as_a_whole_or_left(report, tmp_path, monkeypatch):
    path = tmp_path / "check.json"
    path.write_text("old")

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(ValueError, match=r"cannot write .*check\.json: No space left"):
            report.save(path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    report.save(path)
    assert path.read_text() != "old"


def test_other_names_are_refused(report, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.html or \.json, got 'check\.pdf'"):
        report.save(tmp_path / "check.pdf")
    with pytest.raises(ValueError, match=r"path: expected a folder that exists, got .*nowhere"):
        report.save(tmp_path / "nowhere" / "check.html")
