"""The batches of an epoch, with a place in it that any number of workers can go on from."""

from typing import Any, Dict, List, Sequence

from fairseq.data.iterators import EpochBatchIterator


class EpochBatches(EpochBatchIterator):
    """Stock fairseq's iterator. It saves its place in batches per worker, which is another one for other workers.

    Worker w of W gets the batches w, w + W, w + 2W, ... of the epoch, so after n of them n W are done. Another number
    of workers goes on there; where it does not divide n W, with the batches since its last multiple.

    Where the batches of an epoch do not divide evenly, some workers end with an empty one, in whose place the trainer
    puts a dummy. When the last micro-batch of an update is a dummy, the trainer counts none of the worker's tokens in
    this update. So the empty one comes first among the micro-batches of its update.
    """

    update_freq: Sequence[int] = (1,)
    """Micro-batches per update, by epoch, as in ``--update-freq``."""

    @classmethod
    def like(cls, iterator: EpochBatchIterator, update_freq: Sequence[int] = (1,)) -> "EpochBatches":
        """The same iterator as one of this class."""
        batches = cls.__new__(cls)
        batches.__dict__.update(iterator.__dict__)
        batches.update_freq = update_freq
        return batches

    def ordered_batches(self, epoch: int, *args: Any, **kwargs: Any) -> List[Any]:
        batches = list(super().ordered_batches(epoch, *args, **kwargs))
        if batches and len(batches[-1]) == 0:
            micro_batches = self.update_freq[min(epoch, len(self.update_freq)) - 1]
            update = (len(batches) - 1) // micro_batches * micro_batches
            batches.insert(update, batches.pop())
        return batches

    def state_dict(self) -> Dict[str, Any]:
        state = super().state_dict()
        return {**state, "batches_in_epoch": state["iterations_in_epoch"] * self.num_shards}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        if "batches_in_epoch" in state_dict:
            done = state_dict["batches_in_epoch"] // self.num_shards
            state_dict = {**state_dict, "iterations_in_epoch": done}
        super().load_state_dict(state_dict)
