"""Which channels stand or fall together: `trace` finds the groups, proves them, and names what is frozen."""

from compress.groups.branches import Branch as Branch
from compress.groups.branches import branches as branches
from compress.groups.cut import Kept as Kept
from compress.groups.cut import cut as cut
from compress.groups.cut import removed_elements as removed_elements
from compress.groups.cut import zero as zero
from compress.groups.prove import Bench as Bench
from compress.groups.prove import prove as prove
from compress.groups.trace import trace as trace
from compress.groups.types import Count as Count
from compress.groups.types import Group as Group
from compress.groups.types import Slice as Slice
