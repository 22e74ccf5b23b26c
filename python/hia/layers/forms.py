"""Names of the exact forms of the adapter's maths; :mod:`hia.layers.plan` costs them."""

from __future__ import annotations

import warnings

from ..renamed import GONE_IN

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
    """Split ``HiAConfig.plan`` into the two parts' forms: "auto", a form for both, or "<extract>/<inject>".

    Raises:
        ValueError: no such form.
    """
    extract, slash, inject = map(_present_name, plan.partition("/"))
    if not slash:
        inject = extract if extract in INJECT_FORMS else AUTO
    if extract not in (AUTO, *EXTRACT_FORMS) or inject not in (AUTO, *INJECT_FORMS):
        raise ValueError(
            f"HiAConfig: plan must be 'auto' or '<extract>/<inject>' with extract among {', '.join(EXTRACT_FORMS)} and "
            f"inject among {', '.join(INJECT_FORMS)}, got {plan!r}"
        )
    return extract, inject


def _present_name(form: str) -> str:
    if form not in OLD_NAMES:
        return form
    warnings.warn(
        f"hia: the plan's form {form!r} is called {OLD_NAMES[form]!r} now; the old name goes with version {GONE_IN}",
        FutureWarning,
        stacklevel=4,
    )
    return OLD_NAMES[form]
