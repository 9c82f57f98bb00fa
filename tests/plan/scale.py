"""Makes the tables of docs/scale.md again: `make scale`, or `python -m tests.plan.scale`.

Each plan is a process of its own and kept in `.scale/` with the package's sources it was made from,
so a second call goes on where the first was stopped.
"""

import argparse
import hashlib
import json
import pathlib
import re
import subprocess
import sys

from speciarl_jax.plan.table import Plan, scale_table

ROOT = pathlib.Path(__file__).parents[2]
PAGE, KEPT = ROOT / "docs" / "scale.md", ROOT / ".scale"
BEGIN, END = "<!-- tables: make scale -->\n", "<!-- end of the tables -->\n"
PLANS = (
    ("qwen2_5_vl_7b_v5e", "v5e:8x8"),
    ("qwen2_5_vl_7b_v6e", "v6e:4x4"),
    ("qwen2_5_vl_7b_v5p", "v5p:2x2x4"),
    ("qwen2_5_vl_7b_cub", "v5p:2x2x4"),
    ("qwen2_5_vl_32b_v5p", "v5p:4x4x4"),
    ("qwen2_5_vl_72b_v5p", "v5p:4x4x4"),
)


def sources() -> str:
    """A hash of what a plan depends on."""
    found = hashlib.sha256()
    for folder in ("speciarl_jax", "configs"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def make(recipe: str, topology: str) -> Plan:
    """The plan, from `.scale/` if it is there."""
    kept = KEPT / f"{recipe}-{topology.replace(':', '-')}-{sources()}.json"
    if not kept.exists():
        words = ["plan", f"--config={ROOT}/configs/{recipe}.py", f"--topology={topology}", "--json"]
        found = subprocess.run(
            [sys.executable, "-m", "speciarl_jax.cli", *words],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        KEPT.mkdir(exist_ok=True)
        kept.write_text(found.stdout)
    plan: Plan = json.loads(kept.read_text())
    return plan


def main() -> None:
    """Puts the tables between the two marks; with ``--only`` those of other recipes stay."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="recipes whose name holds this")
    only = parser.parse_args().only
    before, rest = PAGE.read_text().split(BEGIN)
    found, after = rest.split(END)
    tables = {
        one.splitlines()[0]: one.strip() for one in re.split(r"^(?=### )", found, flags=re.M)[1:]
    }
    if not only:
        tables = {}
    for recipe, topology in PLANS:
        if only in recipe:
            table = scale_table(make(recipe, topology))
            tables[table.splitlines()[0]] = table
            text = "\n\n".join(tables.values())
            PAGE.write_text(f"{before}{BEGIN}\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
