"""Reports: what a run shows while it goes, and what it leaves behind.

    with hdp.report.Run("runs/first", world, settings={"arguments": vars(args)}) as run:
        run.evaluation(loss)                 # the first is "before", the last is "after"
        for batch in loader:
            ...
            run.step(batch, result, lr=..., grad_norm=...)

Rank 0 writes and speaks; on other ranks every call returns at once. The folder then holds ``metrics.jsonl``,
TensorBoard files, ``loss.png``, ``step.png`` (who computed what, and who waited), ``settings.json`` (all that reproduces
the run) and ``summary.txt``. :func:`launch` and :class:`ArgumentParser` say once what all ranks met.
"""

from hdp.report.arguments import ArgumentParser, tokens_or_auto
from hdp.report.failures import launch
from hdp.report.run import Run

__all__ = ["ArgumentParser", "Run", "launch", "tokens_or_auto"]
