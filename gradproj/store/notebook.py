"""A store as a notebook shows it."""

from typing import Any

from gradproj.formatting import Html, html_table, html_text, listed

_MOST_DOMAINS = 12
_COLUMNS = ("layer", "type", "inputs", "outputs", "values")


def store_html(store: Any) -> Html:
    """Return the facts of a ``ProjectionStore`` as tables; the layers' is folded."""
    counts = {name: n for name, n in store.status_counts().items() if n}
    of = ", ".join(f"{n:,} {name}" for name, n in counts.items())
    shape = f"{store.dim:,} values of {len(store.layers):,} layers, as {store.layout.stored_as}"
    facts: list[tuple[str, object]] = [("documents", f"{len(store):,}: {of}"), ("row", shape)]
    if store.head is not None:
        facts.append(("head rows", f"{store.head.segment.n_rows} x {store.head.segment.k}"))
    basis = store.attributes.get("basis")
    facts.append(("basis", str(basis.get("kind")) if isinstance(basis, dict) else "random"))
    if store.domains:
        more = len(store.domains) - _MOST_DOMAINS
        names = listed(store.domains[:_MOST_DOMAINS]) + (f" and {more:,} more" if more > 0 else "")
        facts.append(("domains", f"{len(store.domains):,}: {names}"))
    layers = html_table(
        _COLUMNS,
        [
            (each.name, each.type, each.n_i, each.n_o, f"{each.k_o} x {each.k_i}")
            for each in store.layers
        ],
    )
    return Html(
        f"<b>ProjectionStore</b> {html_text(str(store.path))}{html_table((), facts)}"
        f"<details><summary>layers</summary>{layers}</details>"
    )
