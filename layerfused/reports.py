"""What the rules saw of their layers, under the parameters' names."""

from .table import Table


def by_name(groups: list[dict], tables: list[Table], here) -> dict[str, dict]:
    """The reports of all layers: parameter name (or "group.index") -> report name -> float, or list if it is cut.

    `here` gives what tables hold for a parameter.
    """
    found = {}
    for table in tables:
        report = table.report.tolist()
        for p, layers in zip(table.params, table.layers_of(), strict=True):
            columns = {name: [report[n][k] for n in layers] for k, name in enumerate(table.rule.report)}
            found[p] = {name: c[0] if len(c) == 1 else c for name, c in columns.items()}
    params = [p for group in groups for p in group["params"]]
    return {name: found[here(p)] for name, p in zip(names_of(groups), params, strict=True)}


def names_of(groups: list[dict]) -> list[str]:
    """A name for each parameter: its own, or "group.index" where it has none, or another has it already."""
    names = {}
    for number, group in enumerate(groups):
        places = [f"{number}.{i}" for i in range(len(group["params"]))]
        for name, place in zip(group.get("param_names") or places, places, strict=True):
            names[place if name in names else name] = None  # two models may share names
    return list(names)
