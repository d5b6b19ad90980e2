"""Explanations of the terms that the report of `check` prints.

Internal names: `GLOSSARY`, `explain`.
"""

from __future__ import annotations

import re
import textwrap

GLOSSARY: dict[str, str] = {
    "calibrated": (
        "No test finds an error: on average over data sets, the posterior contains the truth as "
        "often as it states. This does not mean that the posterior is narrow; see "
        "'uses the data'."
    ),
    "cannot tell": (
        "There are too few data sets: an error, or unused information, that matters could be "
        "missed. The report gives the smallest one that would be found. Check with more data sets."
    ),
    "over-confident": (
        "The posterior is too narrow: the truth lies in its tails too often. Use more simulations "
        "or more members, or correct it with sf.recalibrate or sf.conformal."
    ),
    "under-confident": (
        "The posterior is too wide. Statements from it are true but vaguer than they could be."
    ),
    "biased": "The posterior lies too high or too low, on average over data sets.",
    "mis-shaped": (
        "The shape is wrong, although the tests of shift and width pass: for example skewed the "
        "wrong way, or with a wrong correlation."
    ),
    "jointly": (
        "The tests of single parameters find no error, but the joint tests do. The report names "
        "the combination of parameters, in posterior standard deviations, whose width is most "
        "wrong."
    ),
    "uses the data": (
        "The posterior uses all the information that regressions, independent of the network, "
        "find in the data."
    ),
    "leaves information unused": (
        "The data predict where the truth lies within the posterior. A better posterior exists, "
        "with a log density of the truth that is higher by the given nats or more. Use an "
        "embedding or summaries for this kind of data, a larger network or more simulations."
    ),
    "learned nothing beyond the linear start": (
        "Training starts at the posterior of a linear model with Gaussian noise. On held-out rows "
        "the trained network is not better than this start. If the simulator is linear and "
        "Gaussian, this is right."
    ),
    "nats": (
        "Unit of information: natural logarithm of a ratio of densities. 0.69 nats about one "
        "parameter make its posterior half as wide."
    ),
    "p, corrected p": (
        "Probability of a deviation at least as large if the posterior is correct. Corrected "
        "p-values allow for the number of tests (Holm): if any is below the level, the posterior "
        "is rejected."
    ),
    "level": "Probability of rejecting a correct posterior, for each line of the verdict.",
    "shift (sd)": (
        "Posterior mean minus truth on average, in posterior standard deviations. Positive: too "
        "high."
    ),
    "width": "Width of the posterior divided by the correct width. x0.70 is too narrow.",
    "ranks p": (
        "Test that the ranks of the truths among posterior draws are uniform (simulation-based "
        "calibration, SBC)."
    ),
    "log-gamma": (
        "Another test of the same ranks (Modrak et al. 2023). Below 0: rejects at 5%, without "
        "correction for the number of parameters."
    ),
    "90% interval": "Fraction of truths inside the central 90% interval; correct is 0.9.",
    "contraction": (
        "1 - posterior variance / prior variance at a typical data set. 0: nothing is learned; 1: "
        "the parameter is known exactly; negative: wider than the prior."
    ),
    "not learned from the data": (
        "The posterior of the parameter is about as wide as the prior and does not move with x: "
        "contraction below 0.1, and the variance of the posterior mean below 5% of that of the "
        "prior."
    ),
    "HPD coverage": (
        "Fraction of truths inside the joint region of highest posterior density (HPD) of a given "
        "probability. It should be that probability."
    ),
    "TARP": (
        "Coverage of regions around random points near the truth (tests of accuracy with random "
        "points). It tests the joint posterior, and rejects a posterior that ignores the data."
    ),
    "ATC": (
        "Area between the TARP curve and the diagonal above one half. Negative: over-confident. "
        "Positive: under-confident."
    ),
}
"""Explanations by term."""


VERDICTS = ("calibrated", "uses the data")
"""Terms that begin a line of the report."""


def explain(text: str) -> str:
    """Explain the terms of the glossary that occur in a text."""
    lines = []
    for term, meaning in GLOSSARY.items():
        words = "|".join(re.escape(word.strip()) for word in term.split(","))
        # verdicts begin a line; the words of one may occur within another
        start = "^" if term in VERDICTS else ""
        if re.search(f"{start}({words})", text, flags=re.MULTILINE):
            lines.append(textwrap.fill(f"{term}: {meaning}", 100, subsequent_indent="    "))
    return "\n".join(lines)
