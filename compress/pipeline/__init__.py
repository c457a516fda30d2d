"""The whole run: stages in order, each leaving one artefact, so that a run killed anywhere goes on where it stopped."""

from compress.pipeline.context import Event as Event
from compress.pipeline.context import OnEvent as OnEvent
from compress.pipeline.prepare import epochs as epochs
from compress.pipeline.reuse import serves as serves
from compress.pipeline.rounds import check as check
from compress.pipeline.sequence import run as run
from compress.pipeline.widths import dry_run as dry_run
from compress.pipeline.zeros import dry_run_weights as dry_run_weights
