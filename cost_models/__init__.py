"""Cost models: pure functions of site, form and workload.

`flops` is exact and knows no time. `latency` adds nanoseconds: it says which kernels the shipped graph runs
(`kernels`) and asks a clock how long each takes, either `roofline` (device ceilings from a profile in `devices/`) or
`measured` (a table swept on the device with ONNX Runtime). A cost model sees no graph, no tensor and no device, so
one site can be checked by hand.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from blora_compiler.values import Cost, Form, Operator, Site, Workload


class CostModel(Protocol):
    """Prices sites in any form, and the operators around them."""

    def cost(self, site: Site, form: Form, workload: Workload) -> Cost: ...

    def operator_cost(self, operator: Operator, workload: Workload) -> Cost: ...


class GroupCostModel(CostModel, Protocol):
    """Also prices sites that read the same input together, where that is something else than one by one."""

    def groups(self, sites: Sequence[Site]) -> list[tuple[Site, ...]]: ...

    def group_costs(self, sites: Sequence[Site], forms: Sequence[Form], workload: Workload) -> tuple[Cost, ...]: ...

    def combination_times(
        self, sites: Sequence[Site], forms: Sequence[Sequence[Form]], workload: Workload
    ) -> np.ndarray: ...
