"""Tell if a script's run fits a pod, how fast it could be and what it sends, before there is one.

    python plan.py train_ppo --model.preset=llama3-8b --topology=v5e:16x16 --mesh.fsdp=64
        --mesh.tensor=4 --batch_size=512
    python plan.py train_sft --model.preset=llama3-8b --topology=v5e:16x16 --length=2048
        --batch_size=512 --sweep
    python plan.py experiments/mine/train_sft --topology=h200:8

All other flags are the script's own. Its jitted functions are compiled by the chips' real compiler
for a mesh of chips that are not here; no weight is ever made. A fork is named by its path, and
takes its modules from beside itself, as when it is run. Ends with exit code 0 where the run fits
and 1 where it does not.
"""

import runtime.interrupt  # noqa: F401

import pathlib
import sys

if __name__ == "__main__" and len(sys.argv) > 1 and "/" in sys.argv[1]:
    # Before importing any module that a fork may replace.
    sys.path.insert(0, str(pathlib.Path(sys.argv[1]).resolve().parent))

from planning.plan import FLAGS_HELP, HELP, Verdict, main
from runtime import flags


def run(argv: list[str]) -> int:
    """Run planning.plan.main(argv) as a command: return 0 where the run fits, 1 where it does not.

    `argv`: a script's name or a fork's path, with or without .py, then --topology=CHIP:SHAPE, such
    as v5e:16x16 or h200:8, which is required, perhaps --sweep, and the script's own flags. --sweep
    tries meshes: 0 where one of them fits. A UserError ends the process with exit code 2 and a
    line on stderr; `--help` after a script with 0. `--help` without one prints what plan.py takes,
    and returns 0.
    """
    if not HELP.isdisjoint(argv) and argv[0].startswith("-"):
        flags.ending_in_one_line(lambda: print(f"{__doc__}\n{FLAGS_HELP}"))
        return 0
    # `ending_in_one_line` returns nothing, so the verdict comes out in a list.
    verdicts: list[Verdict | None] = []
    flags.ending_in_one_line(lambda: verdicts.append(main(argv)))
    verdict = verdicts[0]
    return 0 if verdict and verdict.fits else 1


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
