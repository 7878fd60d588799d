"""Whether a script's run fits a pod, how fast it could be and what it sends, before there is a pod.

    python plan.py train_ppo --model.preset=llama3-8b --topology=v5e:16x16 --mesh.fsdp=64 --mesh.tensor=4 --batch_size=512
    python plan.py train_sft --model.preset=llama3-8b --topology=v5e:16x16 --length=2048 --batch_size=512 --sweep

All other flags are the script's own. Its jitted functions are compiled by the chips' real compiler for a mesh of chips
that are not here; no weight is ever made. Ends with exit code 0 where the run fits and 1 where it does not.
"""

import sys

from planning.plan import Verdict, main
from runtime import flags


def run(argv: list[str]) -> int:
    """`main` as a command: its exit code."""
    verdicts: list[Verdict | None] = []
    flags.ending_in_one_line(lambda: verdicts.append(main(argv)))
    return 0 if verdicts[0] and verdicts[0].fits else 1


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
