"""The verdicts of an analysed comparison as the page and the terminal say them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vwn.lab.analysis import wording

FOR, AGAINST, OPEN = "for", "against", "open"
SIDES = {
    **dict.fromkeys(("held", "below", "does not explain it"), FOR),
    **dict.fromkeys(("not held", "above", "explains it"), AGAINST),
}


@dataclass(frozen=True)
class Verdict:
    """One verdict.

    Args:
        title: what was asked.
        word: the answer.
        text: its numbers with their uncertainty, in sentences; of several arms those of the widest, the first of them.
        arms: every arm's name, its own word and its numbers, where there are several.
        note: on whom it is held and by which rule, or nothing.
    """

    title: str
    word: str
    text: str
    arms: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    note: str = ""

    @property
    def side(self) -> str:
        """`"for"` or `"against"` what the study is about, or `"open"`."""
        return SIDES.get(self.word, OPEN)


def verdicts(report: dict[str, Any]) -> list[Verdict]:
    """Of the claims; in studies without claims of every arm, then of every control."""
    if report["claims"]:
        return [_of_claim(claim, report) for claim in report["claims"]]
    arms = [
        Verdict(f"{found['arm']} against {found['against']}", _arm_word(found), found["text"])
        for found in report["arm_verdicts"]
    ]
    return arms + [
        Verdict(f"Does {found['control']} explain {found['arm']}?", found["verdict"], found["text"])
        for found in report["control_verdicts"]
    ]


def _arm_word(found: dict[str, Any]) -> str:
    return wording.VERDICT_WORDS[found["loss"]["verdict"] if found["loss"] else "unknown"]


def _of_claim(claim: dict[str, Any], report: dict[str, Any]) -> Verdict:
    title, judged = f"({claim['claim']}) {claim['title']}", claim["numbers"]["arms"]
    if not judged:
        return Verdict(title, claim["verdict"], claim["text"])
    widest = wording.widest_arm(report)
    lead = next((arm for arm in judged if widest is not None and arm["arm"] == widest["name"]), judged[0])
    note = claim["text"]
    for arm in judged:
        note = note.replace(f" {_numbers(arm)}", "")
    several = len(judged) > 1
    arms = tuple((arm["arm"], arm["verdict"], tuple(part["text"] for part in arm["parts"])) for arm in judged)
    width = {arm["name"]: arm["r"] for arm in report["summary"]}
    rivals = [arm for arm in judged if widest is not None and width[arm["arm"]] == widest["r"]]
    which = "The widest arm, " if len(rivals) == 1 else "The first of the widest arms, "
    text = f"{which if several else ''}{_numbers(lead)}"
    return Verdict(title, claim["verdict"], text, arms if several else (), note)


def _numbers(arm: dict[str, Any]) -> str:
    return f"{arm['arm']}: {'; '.join(part['text'] for part in arm['parts'])}."
