"""Why a network is not faster: its operators one by one, and findings, each with what mending it would gain."""

from compress.doctor.examine import Diagnosis, examine
from compress.doctor.findings import FINDINGS, Finding
from compress.doctor.profile import Asked, Node, Profile

__all__ = ["FINDINGS", "Asked", "Diagnosis", "Finding", "Node", "Profile", "examine"]
