"""Ship a study's routers: copy the checkpoint of one run, set to the operating point that the validation rows chose,
with what the test rows said of it.

    python tests/bench/ship.py runs/routing level-calibrated-0 checkpoints/smollm2-135m-fa-ssa
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from elastic.bench.studies.routing import headlines, named
from elastic.bench.studies.runs import FOREIGN, has_rows, read_study
from elastic.files import sealed
from elastic.model.checkpoint import METADATA, read_elastic


def main(argv: list[str]) -> int:
    """Copy, set, and read back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="--out of tests/bench/routing.py")
    parser.add_argument("run", help="name of a run whose checkpoint was kept")
    parser.add_argument("target", type=Path, help="checkpoint folder to write")
    args = parser.parse_args(argv)
    study = read_study(args.study)
    run = named(study, args.run)
    if run.tested is None:
        raise SystemExit(f"{run.folder} has no results_test.json yet; let tests/bench/routing.py finish")
    source = run.folder / "checkpoint"
    stored = read_elastic(source)
    samples = sum(int(row["n"]) for row in run.tested.sources.values())
    stored["config"]["sparsity_bias"] = run.tested.bias
    stored["metrics"] = {
        "rows": f"{samples} samples of the test split; sparsity_bias chosen on the validation split",
        **headlines(run.tested, study.dense),
    }
    if has_rows(args.study, FOREIGN):
        foreign = read_study(args.study, FOREIGN)
        tested = named(foreign, args.run).tested
        if tested is None:
            raise SystemExit(f"{run.folder} has no test results on the foreign set; let tests/bench/routing.py finish")
        stored["metrics"][FOREIGN] = headlines(tested, foreign.dense)
    for key in ("gpu", "commit", "command"):
        stored["recipe"][key] = study.stamp[key]
    shutil.rmtree(args.target, ignore_errors=True)
    shutil.copytree(source, args.target)
    (args.target / METADATA).write_text(sealed(stored), encoding="utf-8")
    read_elastic(args.target)
    sys.stdout.write(f"{args.target}: {json.dumps(stored['metrics'])}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
