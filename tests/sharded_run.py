"""Runs of `elm sft`, one after the other, in a process that accelerate takes for one of a GPU: python tests/sharded_run.py RUNS.json

accelerate shards no model on CPUs: of several such processes it makes DDP, whatever the configuration says.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from elm_ecg.training import sft

begin = PartialState.__init__


def begin_as_of_gpus(self: PartialState, *args: Any, **kwargs: Any) -> None:
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = begin_as_of_gpus  # type: ignore[method-assign]
    for run in json.loads(Path(sys.argv[1]).read_text()):
        os.environ.update(run["environment"])
        sft.main(run["arguments"])
