"""Training: one loop for every phase, evaluation, and what a network needs after a cut."""

from __future__ import annotations

from compress.train.check import check_data as check_data
from compress.train.check import check_output as check_output
from compress.train.device import accelerator as accelerator
from compress.train.device import compile_pays as compile_pays
from compress.train.device import has_bf16 as has_bf16
from compress.train.evaluate import evaluate as evaluate
from compress.train.evaluate import recalibrate as recalibrate
from compress.train.feed import Feed as Feed
from compress.train.loop import finetune as finetune
from compress.train.settings import Outcome as Outcome
from compress.train.settings import Progress as Progress
from compress.train.settings import Settings as Settings
from compress.train.settings import schedule as schedule
