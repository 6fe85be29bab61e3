"""Results of an evaluation: each metric with its value or the reason why there is none, as records and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from haste.evaluation.metrics import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS
from haste.tables import NONE, format_number, known_columns, text_table

NAMES = {
    "fd": "FD",
    "kid": "KID",
    "precision": f"precision (k = {PRECISION_NEIGHBOURS})",
    "recall": f"recall (k = {PRECISION_NEIGHBOURS})",
    "density": f"density (k = {DENSITY_NEIGHBOURS})",
    "coverage": f"coverage (k = {DENSITY_NEIGHBOURS})",
    "inception_score": "Inception score",
    "label_accuracy": "label accuracy",
}
DIGITS_SHOWN = {"kid": 5}  # behind the point; of others 3


@dataclass(frozen=True)
class Result:
    """One metric of one set of samples.

    key: of NAMES.
    value: None where it cannot be had.
    spread: standard deviation over subsets or parts.
    note: a caution, or why there is no value.
    """

    key: str
    value: float | None
    spread: float | None = None
    note: str | None = None

    def __str__(self) -> str:
        """'12.340', '0.01230 ± 0.00210' or '81.2%'; a dash for what cannot be had."""
        if self.key == "label_accuracy" and self.value is not None:
            return f"{self.value:.1%}"
        return format_number(self.value, DIGITS_SHOWN.get(self.key, 3), spread=self.spread)


@dataclass(frozen=True)
class Evaluation:
    """The results of one set of samples, and everything that they depend on, as plain values."""

    results: list[Result]
    settings: dict[str, Any]

    def __getitem__(self, key: str) -> Result:
        return next(result for result in self.results if result.key == key)

    def record(self) -> dict[str, Any]:
        """The results by their keys, for JSON: value, and spread and note where there are any."""
        return {
            result.key: {
                name: value
                for name, value in asdict(result).items()
                if name == "value" or (name != "key" and value is not None)
            }
            for result in self.results
        }

    def heading(self) -> str:
        """What was compared with what, in which features."""
        settings = self.settings
        count = settings["reference_count"]
        real = "statistics of real images" if count is None else f"{count:,} real images"
        return (
            f"{settings['samples']}: {settings['count']:,} samples against {real} ({settings['reference']}), "
            f"{settings['dimension']:,} features of {settings['network']}"
        )

    def __str__(self) -> str:
        """A row for each metric, then each caution and each reason once."""
        table = text_table([(NAMES[result.key], str(result)) for result in self.results], "<<")
        return "\n".join([table, *remarks(self.results)])


def remarks(results: Sequence[Result]) -> list[str]:
    """Sentences below a table; metrics that share one have it once."""
    lines: dict[str, list[str]] = {}
    for result in results:
        if result.note:
            lines.setdefault(result.note, []).append(
                "" if result.value is not None else NAMES[result.key].split(" (")[0]
            )
    return [f"No {', '.join(names)}: {note}." if any(names) else note for note, names in lines.items()]


def checkpoints_text(rows: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """One row per checkpoint, one column per metric that any of them has, then the remarks."""
    keys = [result.key for result in rows[0][1]]
    cells = []
    for name, results in rows:
        by_key = {result.key: str(result) for result in results}
        cells.append([name, *(by_key.get(key, NONE) for key in keys)])
    table = text_table(known_columns(["step", *(NAMES[key] for key in keys)], cells), ">")
    return "\n".join([table, *dict.fromkeys(line for _, results in rows for line in remarks(results))])
