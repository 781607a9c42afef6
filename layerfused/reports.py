"""What the rules saw of their layers, under the parameters' names."""

from .table import Table


def by_name(groups: list[dict], tables: list[Table]) -> dict[str, dict]:
    """The reports of all layers: parameter name (or "group.index") -> report name -> float, or list if it is cut."""
    found = {}
    for table in tables:
        report = table.report.tolist()
        for p, layers in zip(table.params, table.layers_of(), strict=True):
            columns = {name: [report[n][k] for n in layers] for k, name in enumerate(table.rule.report)}
            found[p] = {name: c[0] if len(c) == 1 else c for name, c in columns.items()}
    names = {}
    for number, group in enumerate(groups):
        given = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
        for i, (name, p) in enumerate(zip(given, group["params"], strict=True)):
            names[f"{number}.{i}" if name in names else name] = found[p]  # two models may share names
    return names
