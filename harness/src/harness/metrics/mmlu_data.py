"""MMLU's questions, from the original's CSV folder or from the hub, and its categories.

Source: Hendrycks et al., arXiv 2009.03300; its files have no header and six columns: question,
options A to D, answer letter. Everything is read as text, so the option "None" stays "None".
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.data import files
from harness.errors import UserError

LETTERS = ("A", "B", "C", "D")
HUB = "cais/mmlu"

# The benchmark's 17 subcategories; subjects named without their level share it on purpose.
SUBCATEGORIES = {
    "biology": ("college_biology", "high_school_biology"),
    "business": ("business_ethics", "management", "marketing"),
    "chemistry": ("college_chemistry", "high_school_chemistry"),
    "computer science": (
        "college_computer_science",
        "computer_security",
        "high_school_computer_science",
        "machine_learning",
    ),
    "culture": ("human_sexuality", "sociology"),
    "economics": ("econometrics", "high_school_macroeconomics", "high_school_microeconomics"),
    "engineering": ("electrical_engineering",),
    "geography": ("high_school_geography",),
    "health": (
        "anatomy",
        "clinical_knowledge",
        "college_medicine",
        "human_aging",
        "medical_genetics",
        "nutrition",
        "professional_medicine",
        "virology",
    ),
    "history": (
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "prehistory",
    ),
    "law": ("international_law", "jurisprudence", "professional_law"),
    "math": (
        "abstract_algebra",
        "college_mathematics",
        "elementary_mathematics",
        "high_school_mathematics",
        "high_school_statistics",
    ),
    "other": ("global_facts", "miscellaneous", "professional_accounting"),
    "philosophy": (
        "formal_logic",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "world_religions",
    ),
    "physics": ("astronomy", "college_physics", "conceptual_physics", "high_school_physics"),
    "politics": (
        "high_school_government_and_politics",
        "public_relations",
        "security_studies",
        "us_foreign_policy",
    ),
    "psychology": ("high_school_psychology", "professional_psychology"),
}
CATEGORIES = {
    "STEM": ("biology", "chemistry", "computer science", "engineering", "math", "physics"),
    "humanities": ("history", "law", "philosophy"),
    "social sciences": ("culture", "economics", "geography", "politics", "psychology"),
    "other (business, health, misc.)": ("business", "health", "other"),
}


@dataclass(frozen=True)
class Question:
    """One question, its four options and the right letter."""

    question: str
    options: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Subject:
    """A subject's development questions (the shots) and its test questions."""

    name: str
    shots: tuple[Question, ...]
    questions: tuple[Question, ...]


def read(source: str | None = None) -> list[Subject]:
    """All subjects, by name: from a folder with dev/ and test/ CSV files, or (None) from the hub.

    Raises UserError naming the file and line that are not in the benchmark's form.
    """
    return _from_folder(Path(source)) if source else _from_hub()


def _from_folder(folder: Path) -> list[Subject]:
    paths = sorted((folder / "test").glob("*_test.csv"))
    if not paths:
        raise UserError(
            f"{folder} is not an MMLU folder; expected dev/SUBJECT_dev.csv and "
            "test/SUBJECT_test.csv in it"
        )
    subjects = []
    for path in paths:
        name = path.name.removesuffix("_test.csv")
        dev = folder / "dev" / f"{name}_dev.csv"
        shots = _read_csv(dev) if dev.is_file() else ()
        subjects.append(Subject(name, shots, _read_csv(path)))
    return subjects


def _read_csv(path: Path) -> tuple[Question, ...]:
    reader = csv.reader(line for _, line in files.lines(path))
    questions = []
    try:
        for row in reader:
            if len(row) != 6 or row[5].strip() not in LETTERS:
                raise UserError(
                    f"{path}, line {reader.line_num}: expected question, four options and a "
                    f"letter A-D, found {len(row)} columns"
                    + (f" and the answer {row[5]!r:.40}" if len(row) == 6 else "")
                )
            questions.append(Question(row[0], tuple(row[1:5]), row[5].strip()))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    return tuple(questions)


def _from_hub() -> list[Subject]:
    import datasets

    def by_subject(split: str) -> dict[str, list[Question]]:
        questions: dict[str, list[Question]] = {}
        for row in datasets.load_dataset(HUB, "all", split=split):
            question = Question(row["question"], tuple(row["choices"]), LETTERS[row["answer"]])
            questions.setdefault(row["subject"], []).append(question)
        return questions

    try:
        tests, shots = by_subject("test"), by_subject("dev")
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"MMLU could not be had from the hub ({reason}); give a folder of its CSV files: "
            "--mmlu PATH"
        ) from error
    return [Subject(n, tuple(shots.get(n, ())), tuple(q)) for n, q in sorted(tests.items())]


def take(subjects: Sequence[Subject], limit: int | None) -> list[Subject]:
    """`limit` questions in all, the same number from every subject as far as they have them.

    Within a subject they are evenly spaced. The same limit takes the same questions.
    """
    if limit is None or limit >= sum(len(s.questions) for s in subjects):
        return list(subjects)
    shares = dict.fromkeys((s.name for s in subjects), 0)
    left = limit
    while left:
        for subject in subjects:
            if left and shares[subject.name] < len(subject.questions):
                shares[subject.name] += 1
                left -= 1
    taken = []
    for subject in subjects:
        share, size = shares[subject.name], len(subject.questions)
        picked = tuple(subject.questions[i * size // share] for i in range(share))
        if picked:
            taken.append(replace(subject, questions=picked))
    return taken
