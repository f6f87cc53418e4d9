"""The registry of cases. A new case is a file with a ``CASE`` and a line here."""

from benchmarks.case import Case
from benchmarks.cases import (
    backward,
    call,
    count,
    evaluation,
    host,
    import_time,
    memory,
    select,
    step,
    threshold,
    train_step,
)

CASES: dict[str, Case] = {
    module.CASE.name: module.CASE
    for module in (
        *(threshold, backward, select, count, step),
        *(train_step, evaluation, memory),
        *(call, host, import_time),
    )
}
