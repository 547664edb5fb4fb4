"""No modules import each other in a circle, not even for type checkers: every module can be read after those it imports."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp


def test_no_circles_between_modules() -> None:
    graph = grimp.build_graph("tinyfusion", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 150 and any(imports.values())
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' <- '.join(error.args[1])}") from error
