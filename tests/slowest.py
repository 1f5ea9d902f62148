"""Write the table of the slowest tests into tests/README.md: uv run python -m tests.slowest REPORT.xml

The report is of pytest's `--junitxml REPORT.xml`; the seconds are those of fixture and test on that machine.
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- slowest: written by tests/slowest.py -->\n", "<!-- end -->\n"
SHOWN = 30


def table(report: Path) -> str:
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    seconds = sorted(((float(case.get("time", 0)), case) for case in cases), key=lambda row: -row[0])
    rows = [
        f"| {time_s:.1f} | {(case.get('classname') or '').removeprefix('tests.')} | {case.get('name')} |"
        for time_s, case in seconds[:SHOWN]
    ]
    total = f"{len(cases)} tests, {sum(time_s for time_s, _ in seconds):.0f} s in all.\n\n"
    return total + "\n".join(["| s | module | test |", "|---|---|---|", *rows]) + "\n"


def main(report: str) -> None:
    if not Path(report).is_file():
        sys.exit(f"{report} does not exist: give what pytest --junitxml has written, once it has ended.")
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}{table(Path(report))}{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "REPORT.xml")
