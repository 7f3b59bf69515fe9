"""The batches of an epoch, with a place in it that any number of workers can go on from."""

from typing import Any, Dict

from fairseq.data.iterators import EpochBatchIterator


class EpochBatches(EpochBatchIterator):
    """Stock fairseq's iterator. It saves its place in batches per worker, which is another one for other workers.

    Worker w of W gets the batches w, w + W, w + 2W, ... of the epoch, so after n of them n W are done. Another number
    of workers goes on there; where it does not divide n W, with the batches since its last multiple.
    """

    @classmethod
    def like(cls, iterator: EpochBatchIterator) -> "EpochBatches":
        """The same iterator as one of this class."""
        batches = cls.__new__(cls)
        batches.__dict__.update(iterator.__dict__)
        return batches

    def state_dict(self) -> Dict[str, Any]:
        state = super().state_dict()
        return {**state, "batches_in_epoch": state["iterations_in_epoch"] * self.num_shards}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        if "batches_in_epoch" in state_dict:
            done = state_dict["batches_in_epoch"] // self.num_shards
            state_dict = {**state_dict, "iterations_in_epoch": done}
        super().load_state_dict(state_dict)
