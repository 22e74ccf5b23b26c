"""import-linter's contract type ``only``, which ``pyproject.toml`` uses: all that a module may import."""

from __future__ import annotations

import sys

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class Only(Contract):
    """Allow ``source_modules`` the standard library and ``allowed_modules``; one import more breaks the contract.

    import-linter's own types forbid modules by name, so a package that nobody has thought of would pass.
    Expressions are import-linter's (``package.*.module``, ``package.**``); a module's import of itself is allowed.
    """

    type_name = "only"

    source_modules = fields.ListField(subfield=fields.StringField())
    allowed_modules = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        sources, allowed = (self._matching(graph, names) for names in (self.source_modules, self.allowed_modules))
        broken = []
        for source in sorted(sources):
            for imported in sorted(graph.find_modules_directly_imported_by(source) - allowed):
                if imported.split(".")[0] not in sys.stdlib_module_names:
                    broken += graph.get_import_details(importer=source, imported=imported)
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for found in check.metadata["broken"]:
            output.print_error(f"{found['importer']}:{found['line_number']} imports {found['imported']}", bold=False)
        output.print(f"Allowed: the standard library, {', '.join(self.allowed_modules)}.")

    @staticmethod
    def _matching(graph: ImportGraph, expressions: list[str]) -> set[str]:
        """Return the modules that the expressions match; one that matches nothing is a contract that checks nothing."""
        found = {expression: graph.find_matching_modules(expression) for expression in expressions}
        stale = [expression for expression, modules in found.items() if not modules]
        if stale:
            raise ValueError(f"no module is {', '.join(stale)}")
        return set().union(*found.values())
