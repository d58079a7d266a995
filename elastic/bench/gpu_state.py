"""What the GPU did while it was timed: its clock and the power it drew, as the driver's own tool reads them."""

import shutil
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from elastic.bench.records import Measurement

WHO, CLOCK, POWER = "gpu", "SM clock", "power"
UNITS = {CLOCK: "MHz", POWER: "W"}
_QUERY = ("--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "50")


@contextmanager
def watched(device: torch.device) -> Iterator[list[Measurement]]:
    """Inside, read the GPU's state every 50 ms. After it the list holds two records, the medians of `SM clock` in MHz
    and `power` in W; none where the tool is absent, or was too slow to read anything.
    """
    found: list[Measurement] = []
    tool = shutil.which("nvidia-smi")
    if device.type != "cuda" or tool is None:
        yield found
        return
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    watching = subprocess.Popen([tool, which, *_QUERY], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        yield found
    finally:
        watching.terminate()
        found += summary(watching.communicate()[0].splitlines())


def summary(lines: Sequence[str]) -> list[Measurement]:
    """Medians of lines `clock, power`, without lines that were cut short and figures that the GPU does not tell."""
    read: dict[str, list[float]] = {name: [] for name in UNITS}
    for line in lines:
        for name, text in zip(UNITS, line.split(", "), strict=False):
            if text.replace(".", "", 1).isdigit() and line.count(", ") == 1:
                read[name].append(float(text))
    return [
        {"who": WHO, "metric": name, "value": statistics.median(values), "unit": UNITS[name]}
        for name, values in read.items()
        if values
    ]


def ranges(found: Sequence[Measurement]) -> list[str]:
    """One line for all cases: from the lowest to the highest; none without readings."""
    parts = []
    for name, unit in UNITS.items():
        values = [record["value"] for record in found if (record["who"], record["metric"]) == (WHO, name)]
        if values:
            parts.append(f"{name} {min(values):.0f} to {max(values):.0f} {unit}")
    return [f"GPU while it was timed, medians of the cases: {', '.join(parts)}"] if parts else []
