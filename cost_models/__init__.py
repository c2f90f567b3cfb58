"""Cost models: pure functions of site, form and workload. One question, one method.

`flops` is exact. A cost model sees no graph, no tensor and no device, so one site can be checked by hand.
"""

from typing import Protocol

from blora_compiler.values import Cost, Form, Operator, Site, Workload


class CostModel(Protocol):
    """Prices sites in any form, and the operators around them."""

    def cost(self, site: Site, form: Form, workload: Workload) -> Cost: ...

    def operator_cost(self, operator: Operator, workload: Workload) -> Cost: ...
