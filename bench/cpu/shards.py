"""What a weight that is cut along its columns costs, where each of its rows is a row of the sweep's
table, against one that is cut along its rows: ``python -m bench.cpu.shards``.

One thread; a dense sweep of one direction over a process's part of a weight, and the look at where
its tensors lie, once a step; the fingerprint of the part, once a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from zo_fused.step.fingerprint import sum_of_part
from zo_fused.sweeps.conversions import int64_tensor
from zo_fused.sweeps.prepared import prepare
from zo_fused.sweeps.shards import Cut, Shard

SIZE, PARTS = 4096, (2, 8)
TIMES = 15


def least(action: Callable[[], object]) -> float:
    """Milliseconds of the process that it takes, of several times the shortest."""
    taken = []
    for _ in range(TIMES):
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
    return 1e3 * min(taken)


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print(f"a part of a weight ({SIZE}, {SIZE}), ms: a sweep | a look | the fingerprint")
    for parts in PARTS:
        few = SIZE // parts
        cuts = {"rows": ((few, SIZE), (few, 0)), "columns": ((SIZE, few), (0, few))}
        for dtype in (torch.float32, torch.bfloat16):
            for along, (shape, starts) in cuts.items():
                p, place = torch.zeros(shape, dtype=dtype), Shard((SIZE, SIZE), starts)
                cut = Cut([p], [place])
                assert cut.starts is not None
                count = len(cut.tensors)
                sweep = prepare(
                    "dense_", [cut.tensors], int64_tensor([7] * count), int64_tensor(cut.starts)
                )
                rows = int64_tensor([123]), torch.full((count, 1), 1e-3), torch.ones(count), None
                numbers = [
                    least(lambda sweep=sweep, rows=rows: sweep.run(*rows)),
                    least(sweep.look_again),
                ]
                numbers.append(least(lambda p=p, place=place: sum_of_part(p, place)))
                told = " | ".join(f"{number:.2f}" for number in numbers)
                print(f"1/{parts} by {along}, {str(dtype)[6:]}, {count} rows in the table: {told}")


if __name__ == "__main__":
    main()
