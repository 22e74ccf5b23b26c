"""Names of the exact forms of the adapter's maths; :mod:`hia.layers.plan` costs them."""

from __future__ import annotations

EXTRACT_FORMS = (
    "textbook",
    "folded",
    "absorbed",
    "folded_absorbed",
    "deep_kv",
    "deep_absorbed",
    "cached_folded",
    "cached_kv",
)
INJECT_FORMS = ("textbook", "absorbed")
AUTO = "auto"


def split_plan(plan: str) -> tuple[str, str]:
    """Split ``HiAConfig.plan`` into the two parts' forms: "auto", a form for both, or "<extract>/<inject>".

    Raises:
        ValueError: no such form.
    """
    extract, slash, inject = plan.partition("/")
    if not slash:
        inject = extract if extract in INJECT_FORMS else AUTO
    if extract not in (AUTO, *EXTRACT_FORMS) or inject not in (AUTO, *INJECT_FORMS):
        raise ValueError(
            f"HiAConfig: plan must be 'auto' or '<extract>/<inject>' with extract among {', '.join(EXTRACT_FORMS)} and "
            f"inject among {', '.join(INJECT_FORMS)}, got {plan!r}"
        )
    return extract, inject
