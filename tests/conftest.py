"""One thread for everyone: tiny models gain nothing from more, and sums come out the same on every machine."""

import signal

import torch

torch.set_num_threads(1)
# A shell starts background jobs with Ctrl-C ignored, and Python keeps it so; the tests that press it need the usual.
signal.signal(signal.SIGINT, signal.default_int_handler)
