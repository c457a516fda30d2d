"""Accuracy as the target: the smallest network within a budget, by trial runs that Optuna proposes and records."""

from compress.search.proposals import ladder as ladder
from compress.search.run import search as search
from compress.search.settings import Search as Search
from compress.search.settings import read as read
from compress.search.settings import write as write
from compress.search.space import space as space
