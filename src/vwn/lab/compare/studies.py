"""Studies: what to train to answer one question. Each is a list of arms that could be given by hand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Study:
    """A question and the arms that answer it; the first arm is the baseline.

    Args:
        question: in one line.
        arms: as `vwn compare --arms` takes them.
    """

    question: str
    arms: tuple[str, ...]


STUDIES: dict[str, Study] = {
    "widths": Study(
        "Does the loss fall with the virtual width r, and how fast? (figures 1, 6, 7 of the paper)",
        ("plain", "4x6", "4x8", "4x16", "4x32"),
    ),
    "fraction-rate": Study(
        "At r = 4, into how many segments m should the backbone's width be cut? (figure 8 of the paper)",
        ("plain", "1x4", "2x8", "4x16", "8x32"),
    ),
    "mtp": Study(
        "Virtual width and multi-token prediction, each on and off (figure 4 of the paper)",
        ("plain:plain,mtp=0", "plain+mtp:plain,mtp=1", "4x16:4x16,mtp=0", "4x16+mtp:4x16,mtp=1"),
    ),
    "family": Study(
        "Plain residuals, Hyper-Connections, Frac-Connections, mHC and virtual width on the same work",
        (
            "plain",
            "hc:1x4,connection=hc",
            "frac:4x4,connection=hc",
            "mhc:1x4,connection=mhc",
            "4x16",
            "4x16-ds:4x16,carry_constraint=doubly_stochastic",
        ),
    ),
    "embedding": Study(
        "How much of the gain is the table's? Direct, factorised, replicated, and n-gram augmented",
        (
            "plain",
            "plain-ngram:plain,ngram_order=3,ngram_buckets=16384",
            "direct:4x16,embedding=direct",
            "factorised:4x16,embedding=factorised",
            "replicated:4x16,embedding=replicated",
            "ngram:4x16,embedding=factorised,ngram_order=3,ngram_buckets=16384",
        ),
    ),
    "widen": Study(
        "Does widening a trained model pay? As it is, widened with copies or new table columns, or with wider FFNs",
        (
            "plain",
            "4x8:4x8,embedding=replicated",
            "1x4:1x4,embedding=replicated",
            "4x8-table:4x8,embedding=direct",
            "1x4-table:1x4,embedding=direct",
            "plain-params:plain,match_params=1x4-table",
        ),
    ),
    "controls": Study(
        "Is it the width? Learned residuals without width, a wide table without a wide state, wider plain backbones",
        (
            "plain",
            "4x16",
            "1x1",
            "4x4",
            "plain-table:plain,table_factor=4",
            "plain-params:plain,match_params=4x16",
            "plain-flops:plain,match_flops=4x16",
            "plain-width:plain,hidden_scale=2",
        ),
    ),
}
