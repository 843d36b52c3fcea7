"""Runs a script at a pace, and kills ranks of it in the middle of a step:

paced.py SECONDS DEATHS SCRIPT ..

SECONDS: that a step takes longer, so that others can come and go meanwhile, until there is a file
`hurry`. DEATHS: "1:20,0:37": in the first attempt rank 1 dies in step 20, in the second rank 0 in
step 37; "-": none.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from zo_fused.step.optimizer import ZerothOrderOptimizer

seconds, deaths = float(sys.argv[1]), sys.argv[2].split(",")
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
here = [death for death in deaths[attempt : attempt + 1] if death != "-"]
step = ZerothOrderOptimizer.step


def paced(self: ZerothOrderOptimizer, closure: Callable[[], Any], **others: Any) -> Any:
    calls = 0

    def evaluate() -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and f"{os.environ['RANK']}:{now}" in here:
            os.kill(os.getpid(), signal.SIGKILL)
        return closure()

    now = self.step_count
    time.sleep(0 if os.path.exists("hurry") else seconds)
    return step(self, evaluate if here else closure, **others)


ZerothOrderOptimizer.step = paced  # type: ignore[method-assign]
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
