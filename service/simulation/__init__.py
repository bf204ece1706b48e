"""The simulator: the real scheduler on simulated devices, and what the best possible scheduler would have done."""

from service.simulation.arrivals import arrivals, fan_out, read_trace
from service.simulation.optimum import clairvoyant, linear_table, padded_table
from service.simulation.simulator import Disturbance, Load, Outcomes, SimulatedModel, simulate
from service.simulation.summary import Summary, summarise

__all__ = [
    "Disturbance",
    "Load",
    "Outcomes",
    "SimulatedModel",
    "Summary",
    "arrivals",
    "clairvoyant",
    "fan_out",
    "linear_table",
    "padded_table",
    "read_trace",
    "simulate",
    "summarise",
]
