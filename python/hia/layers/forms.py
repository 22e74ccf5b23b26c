"""Names of the exact forms of the adapter's maths; :mod:`hia.layers.plan` costs them."""

from __future__ import annotations

from typing import Any

from ..renamed import GONE_IN, warn_caller

EXTRACT_FORMS = (
    "direct",
    "folded",
    "absorbed",
    "folded_absorbed",
    "ln_folded_kv",
    "ln_folded_absorbed",
    "cached_folded",
    "cached_kv",
)
INJECT_FORMS = ("direct", "absorbed")
AUTO = "auto"
# names until version 0.1
OLD_NAMES = {"textbook": "direct", "deep_kv": "ln_folded_kv", "deep_absorbed": "ln_folded_absorbed"}


def split_plan(plan: str) -> tuple[str, str]:
    """Split a plan into the two parts' forms: "auto", a form for both, or "<extract>/<inject>".

    Raises:
        ValueError: no such form.
    """
    named = present_names(plan)
    if isinstance(plan, str) and named != plan:
        warn_caller(f"hia: the plan {plan!r} is called {named!r} now; the old names go with version {GONE_IN}")
    extract, slash, inject = named.partition("/") if isinstance(named, str) else ("", "", "")
    if not slash:
        inject = extract if extract in INJECT_FORMS else AUTO
    if extract not in (AUTO, *EXTRACT_FORMS) or inject not in (AUTO, *INJECT_FORMS):
        raise ValueError(
            f"hia: plan must be 'auto' or '<extract>/<inject>' with extract among {', '.join(EXTRACT_FORMS)} and "
            f"inject among {', '.join(INJECT_FORMS)}, got {plan!r}"
        )
    return extract, inject


def present_names(plan: Any) -> Any:
    """Replace the names that a plan's forms had until version 0.1; what is no plan stays, for the check of it."""
    if not isinstance(plan, str):
        return plan
    return "/".join(OLD_NAMES.get(form, form) for form in plan.split("/"))
