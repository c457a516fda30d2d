"""Methods side by side: a grid of runs that workers share, their latencies measured together, and which method wins."""

from compress.comparison.document import document as document
from compress.comparison.document import write as write
from compress.comparison.grid import Cell as Cell
from compress.comparison.grid import Grid as Grid
from compress.comparison.grid import read as read
from compress.comparison.latency import measure as measure
from compress.comparison.queue import Queue as Queue
from compress.comparison.work import Progress as Progress
from compress.comparison.work import outcome as outcome
from compress.comparison.work import work as work
