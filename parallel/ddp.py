"""DistributedDataParallel, regime ``step``: gradients stay local until each rank's last micro-batch.

With ``torch.distributed.optim.ZeroRedundancyOptimizer`` as the optimizer this is ZeRO-1, which is how ByteScale trains
(section 1.3): parameters and gradients on every rank, optimizer states sharded.

DDP's all-reduces run beside the backward pass and are waited for at its end, so a rank never stands in one while another
waits for it in attention: no closing micro-batch is needed.
"""

import contextlib
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hdp.balance.foresee import ADAM
from hdp.balance.held import EngineMemory
from hdp.balance.plan import Plan
from hdp.parallel.arrangement import Arrangement, Work, works
from hdp.parallel.batch import MicroBatchInputs
from hdp.parallel.engine import Engine
from hdp.parallel.footprint import bare_model
from hdp.parallel.gradients import Earlier
from hdp.parallel.models import check_attention, check_no_tensor_parallel, check_trained_dtype, check_unwrapped
from hdp.parallel.world import World


class DDPEngine(Engine):
    """See the module. Made by :func:`replicate`."""

    regime = "step"

    def __init__(self, model: nn.Module, world: World, wrapper: DistributedDataParallel) -> None:
        super().__init__(model, world)
        self.wrapper = wrapper
        self._reduces = True
        self._earlier = Earlier(copied=True)  # buckets are reduced whole: what is there would count once a rank
        wrapper.register_comm_hook(None, sum_bucket)

    def engine_memory(self) -> EngineMemory:
        stored = self.dtype.itemsize
        return EngineMemory(
            kind="ddp",
            regime="step",
            sharers=1,
            ranks=self.world.world_size,
            stored=stored,
            computed=stored,
            reduced=stored,
            optimizer=ADAM * stored,
        )

    def _works(self, plan: Plan) -> list[Work]:
        return works(plan, self.world.rank, Arrangement(closing=False))

    def _module(self) -> nn.Module:
        return self.wrapper if torch.is_grad_enabled() else self.model

    def _begin(self) -> None:
        check_recomputation(self.model)
        if torch.is_grad_enabled():
            self._earlier.put_aside(self.model.parameters())

    def _accept(self) -> None:
        self._earlier.add_back()

    def _abandon(self) -> None:
        self._earlier.restore()
        self.wrapper.reducer._reset_state()  # else it would reduce in the next backward pass, whether or not it is the last

    def _before(self, work: Work) -> None:
        self._reduces = work.reduces

    def _sync(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._reduces else self.wrapper.no_sync()

    def _loss(self, inputs: MicroBatchInputs) -> Tensor:
        with self._sync():  # DDP decides in forward whether the next backward reduces
            return super()._loss(inputs)

    def _backward(self, loss: Tensor) -> None:
        with self._sync():
            loss.backward()


def replicate(model: nn.Module, world: World, *, find_unused_parameters: bool = True, bucket_mb: int = 25) -> DDPEngine:
    """Wraps ``model`` with DistributedDataParallel and returns the engine that trains it.

    Args:
        model: moved to this rank's device; its parameters are made equal on all ranks (rank 0's).
        world: from ``hdp.init``.
        find_unused_parameters: needed when some parameter may get no gradient on some rank (mixtures of experts, ranks that
            run only a dummy); costs a walk of the graph in the last micro-batch.
        bucket_mb: MiB of each of DDP's buckets.

    Raises:
        ValueError: attention that is not hdp's, no output head, a model that is wrapped already or of fp16, tensor parallelism.
    """
    check_unwrapped(model)
    check_no_tensor_parallel(world, "DDP")
    check_trained_dtype(model)
    check_attention(model)
    model.to(world.device)
    bare = bare_model(model)
    wrapper = DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        forward_sync_buffers=False,  # ranks run different numbers of forwards
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,
        bucket_cap_mb=bucket_mb,
    )
    engine = DDPEngine(model, world, wrapper)
    engine.bare = bare
    return engine


def sum_bucket(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook: the sum over ranks, where DDP would average. The loss is divided beforehand."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def check_recomputation(model: nn.Module) -> None:
    """Raises ValueError for reentrant checkpointing, whose inner backward passes reach DDP's hooks a second time."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)  # transformers' switch
        if function is not None and getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True does not work with DDP: pass"
                ' gradient_checkpointing_kwargs={"use_reentrant": False}, or use hdp.shard'
            )
