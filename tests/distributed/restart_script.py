"""The command, whose second rank is killed once: in the first start, before a third step."""

import os
import signal
import sys

import cdfast.trainer
from cdfast.train import main


class KilledOnce(cdfast.trainer.DistillationTrainer):
    def training_step(self, *args, **kwargs):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and os.environ["RANK"] == "1" and self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)


if __name__ == "__main__":
    cdfast.trainer.DistillationTrainer = KilledOnce
    main(sys.argv[1:])
