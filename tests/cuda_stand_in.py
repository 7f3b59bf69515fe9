"""fairseq-train on CPU workers with the data-parallel backends that stock fairseq and fairscale keep to GPUs.

What they ask of CUDA is answered for the CPU: streams that wait for nothing, a device, torch's
DistributedDataParallel without device numbers. The backends' own code runs, and gloo carries what they send.
"""

import contextlib
import sys

import fairscale.nn.data_parallel.fully_sharded_data_parallel as fairscale
import fairseq_cli.train
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fairseq_hyperrouter.checks.stock_options


class Stream:
    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


def answer_for_the_cpu():
    stream = Stream()
    torch.cuda.Stream = torch.cuda.current_stream = lambda *args: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.synchronize = lambda *args: None
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.cuda = lambda self, *args, **options: self

    fairscale._get_default_cuda_device = lambda module: torch.device("cpu")
    make_streams = fairscale.FullyShardedDataParallel._setup_streams

    def setup_streams(self):
        is_available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
        try:
            make_streams(self)
        finally:
            torch.cuda.is_available = is_available

    fairscale.FullyShardedDataParallel._setup_streams = setup_streams
    reduce_scatter = dist._reduce_scatter_base  # gloo wants both flat, NCCL does not care
    dist._reduce_scatter_base = lambda output, given, *args, **options: reduce_scatter(
        output.view(-1), given.reshape(-1), *args, **options
    )

    init = DistributedDataParallel.__init__
    DistributedDataParallel.__init__ = lambda self, module, device_ids, output_device, **options: init(
        self, module, **options
    )
    fairseq_hyperrouter.checks.stock_options.check_workers = lambda cfg: None  # would refuse them on the CPU


if __name__ == "__main__":
    answer_for_the_cpu()
    sys.argv[0] = "fairseq-train"
    fairseq_cli.train.cli_main()
