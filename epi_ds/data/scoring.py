"""Score free-text answers."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> float | None:
    """Return the number after ``####`` as in GSM8K, else the last number of the text; None where there is none."""
    _, marker, after = text.rpartition("####")
    found = _NUMBER.findall(after if marker else text)
    return float(found[0 if marker else -1].replace(",", "")) if found else None


def same_final_number(answer: str, reference: str) -> bool:
    """Whether a worked solution ends in the reference's number."""
    number = final_number(answer)
    return number is not None and number == final_number(reference)


def exact_match(answer: str, reference: str) -> bool:
    """Whether the texts are equal up to white space at both ends."""
    return answer.strip() == reference.strip()
