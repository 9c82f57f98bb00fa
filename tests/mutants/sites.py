"""Which small faults are tried, and where: cosmic-ray's operators on chosen files."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import pathlib
import random

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = "speciarl_jax"
DRAWN = 300  # of the rooms that are not tried in full
SEED = 0

# Each file with the tests that speak of it, the nearest first: a run ends with the first failure.
OBJECTIVE = ("tests/objective", "tests/algorithm/test_faults.py", "tests/algorithm/test_learn.py")
SCORING = ("tests/scoring", "tests/report/test_report.py", "tests/cli/test_eval.py")
NAMED = (
    "tests/algorithm/test_faults.py",
    "tests/objective",
    "tests/config/test_options.py",
    "tests/learner/test_trajectory.py",
)
LEARNER = (*NAMED, "tests/learner", "tests/algorithm")
ROLLOUT = ("tests/rollout", "tests/algorithm/test_gather.py")
IN_FULL = {
    "objective/advantage.py": ("tests/objective/test_advantage.py", *OBJECTIVE),
    "objective/loss.py": ("tests/objective/test_loss.py", *OBJECTIVE),
    "objective/reward.py": ("tests/objective/test_reward.py", *OBJECTIVE),
    "objective/token_weights.py": ("tests/objective/test_token_weights.py", *OBJECTIVE),
    "algorithm/credit.py": ("tests/algorithm/test_faults.py", "tests/algorithm", *OBJECTIVE),
    "scoring/bootstrap.py": ("tests/scoring/test_metrics.py", *SCORING),
    "scoring/metrics.py": ("tests/scoring/test_metrics.py", *SCORING),
    "scoring/paired.py": ("tests/scoring/test_paired.py", *SCORING),
    "scoring/predictions.py": ("tests/scoring/test_predictions.py", *SCORING),
    "scoring/seeds.py": ("tests/scoring/test_seeds.py", *SCORING),
    "scoring/sentence_model.py": SCORING,
    "scoring/text_metrics.py": SCORING,
}
IN_PART = {
    "learner/batches.py": LEARNER,
    "learner/logprobs.py": ("tests/learner/test_update.py", *LEARNER),
    "learner/optimizer.py": ("tests/config/test_options.py", *LEARNER),
    "learner/packing.py": ("tests/learner/test_packing.py", *LEARNER),
    "learner/update.py": ("tests/learner/test_update.py", *LEARNER),
    "rollout/decode.py": ("tests/rollout/test_engine.py", *ROLLOUT),
    "rollout/engine.py": ("tests/rollout/test_engine.py", *ROLLOUT),
    "rollout/finished.py": ("tests/rollout/test_engine.py", *ROLLOUT),
    "rollout/sampling.py": ("tests/rollout/test_sampling.py", *ROLLOUT),
}

# One plausible slip an operator, both ways for a comparison; of the many replacements that
# cosmic-ray knows most (a product by a shift) fail at once and would only flatter the score.
_BINARY = (
    "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul", "Pow_Mul",
    "BitAnd_BitOr", "BitOr_BitAnd",
)  # fmt: skip
_COMPARISON = (
    "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt", "Eq_NotEq",
    "NotEq_Eq", "Is_IsNot", "IsNot_Is",
)  # fmt: skip
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{name}" for name in _BINARY),
    *(f"core/ReplaceComparisonOperator_{name}" for name in _COMPARISON),
    "core/ReplaceUnaryOperator_Delete_USub",
    "core/ReplaceUnaryOperator_Delete_Not",
    "core/NumberReplacer",
    "core/AddNot",
    "core/ReplaceTrueWithFalse",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceAndWithOr",
    "core/ReplaceOrWithAnd",
    "core/ReplaceContinueWithBreak",
    "core/ZeroIterationForLoop",
)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        file: below the package.
        line: where, from 1.
        operator, occurrence: cosmic-ray's.
        digest: of the file as it was, so that results of other code do not count.
    """

    file: str
    line: int
    operator: str
    occurrence: int
    digest: str

    @property
    def name(self) -> str:
        """Unique, and stable while the file is."""
        return f"{self.file}:{self.line}:{self.operator.split('/')[1]}:{self.occurrence}"

    @property
    def tests(self) -> tuple[str, ...]:
        """Paths for pytest, without repetition."""
        return tuple(dict.fromkeys((IN_FULL | IN_PART)[self.file]))

    def source(self) -> str:
        """The file with the fault in it."""
        text = (ROOT / PACKAGE / self.file).read_text()
        mutated = mutate_code(text, get_operator(self.operator)(), self.occurrence)
        assert mutated is not None
        return mutated


def mutants_of(file: str) -> list[Mutant]:
    """All faults of a file; annotations, which are not executed for their value, have none."""
    text = (ROOT / PACKAGE / file).read_text()
    spared = _annotations(text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    tree = get_ast(text)
    found = []
    for name in OPERATORS:
        operator = get_operator(name)()
        occurrence = 0
        for node in ast_nodes(tree):
            for start, _ in operator.mutation_positions(node):
                if not any(first <= start < last for first, last in spared):
                    found.append(Mutant(file, start[0], name, occurrence, digest))
                occurrence += 1
    return found


def _annotations(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end) of every annotation and type alias, as (line, column)."""
    nodes: list[ast.expr] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            nodes.append(node.returns)
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            nodes.append(node.annotation)
            if ast.unparse(node.annotation) == "TypeAlias" and node.value is not None:
                nodes.append(node.value)
    return [
        ((n.lineno, n.col_offset), (n.end_lineno or n.lineno, n.end_col_offset or 0)) for n in nodes
    ]


def all_mutants() -> list[Mutant]:
    """Those of the rooms in full, then the drawn ones."""
    full = [mutant for file in IN_FULL for mutant in mutants_of(file)]
    part = [mutant for file in IN_PART for mutant in mutants_of(file)]
    drawn = random.Random(SEED).sample(part, min(DRAWN, len(part)))
    return [*full, *drawn]
