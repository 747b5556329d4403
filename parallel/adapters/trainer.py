"""``transformers.Trainer`` with planned global batches; see ``hdp.parallel.adapters.mixin``."""

from transformers import Trainer

from hdp.parallel.adapters.mixin import HdpTrainerMixin


class HdpTrainer(HdpTrainerMixin, Trainer):
    """A drop-in ``Trainer``: ``HdpTrainer(model, args, train_dataset=..., hdp=HdpConfig(...))``."""
