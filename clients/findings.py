"""What the reading of a file found that a person has to know, by line: how often each, and the first few of each."""

from dataclasses import dataclass, field
from enum import Enum

_KEPT = 10


class Weight(Enum):
    """What follows from a finding."""

    NOTE = "note"
    """It is told."""
    SUSPICION = "suspicious"
    """Nothing is done, unless --yes says that it is right as it is."""
    CONTRADICTION = "refused"
    """Nothing is done: the file has to be changed, or an option has to say what is meant."""


@dataclass
class Finding:
    """One kind of finding: `told` says what it is and what can be done, `examples` the first 10 places."""

    weight: Weight
    told: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """All that was found, in the order in which it was met; what is found on line 0 is no line's."""

    kinds: dict[str, Finding] = field(default_factory=dict)

    def note(self, told: str, line: int, example: str) -> None:
        """What was read otherwise than it is written."""
        self._add(Weight.NOTE, told, line, example)

    def suspect(self, told: str, line: int, example: str) -> None:
        """What is probably not meant."""
        self._add(Weight.SUSPICION, told, line, example)

    def refuse(self, told: str, line: int, example: str) -> None:
        """What cannot be meant, or can be meant in several ways."""
        self._add(Weight.CONTRADICTION, told, line, example)

    def stop(self, yes: bool) -> bool:
        """Whether nothing may be done with the file; `yes`: what is suspicious is right."""
        weights = {finding.weight for finding in self.kinds.values()}
        return Weight.CONTRADICTION in weights or (Weight.SUSPICION in weights and not yes)

    def lines(self) -> list[str]:
        """All findings as text."""
        told = []
        # What stops comes last, where it is seen.
        for finding in sorted(self.kinds.values(), key=lambda finding: list(Weight).index(finding.weight)):
            told.append(f"{finding.weight.value}: {finding.told} ({finding.count:,})")
            told += [f"  {example}" for example in finding.examples]
            if finding.count > len(finding.examples):
                told.append(f"  and {finding.count - len(finding.examples):,} more")
        return told

    def _add(self, weight: Weight, told: str, line: int, example: str) -> None:
        finding = self.kinds.setdefault(told, Finding(weight, told))
        finding.count += 1
        if len(finding.examples) < _KEPT:
            finding.examples.append(f"line {line}: {example}" if line else example)
