"""All benchmarks for a GPU, and the tests that need one: what each prints, and its results in benchmarks/results/.

python -m benchmarks.gpu DATA [--quick] [--only PART ...]      (DATA: a folder made by fairseq-preprocess)
"""

import subprocess
import sys
from pathlib import Path

from ..harness import parser

ROOT = Path(__file__).parents[2]
PARTS = {
    "tests": ["pytest", "-rs", "tests/test_on_gpu.py"],
    "layer": ["benchmarks.gpu.layer"],
    "generation": ["benchmarks.gpu.generation", "DATA"],
    "trainer": ["benchmarks.gpu.trainer", "DATA"],
    "profile": ["benchmarks.gpu.profile", "DATA"],
}


def main() -> int:
    """Run the parts, each in a process of its own; a part that fails does not keep the others from running."""
    options = parser(__doc__, data=True)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    args = options.parse_args()
    failed = []
    for part in args.only:
        command = [str(Path(args.data).resolve()) if word == "DATA" else word for word in PARTS[part]]
        command += ["--quick"] if args.quick and part != "tests" else []
        if subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode:
            failed.append(part)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
