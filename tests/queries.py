"""Every PromQL expression of the bundle, its place, and the metrics that it names.

If a metric does not exist, Grafana shows an empty panel and an alert of Prometheus never fires.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROMETHEUS = ROOT / "docker" / "prometheus"
GRAFANA = ROOT / "docker" / "grafana"
DASHBOARDS = GRAFANA / "dashboards"

# the values that Grafana puts into an expression when all models, versions and replicas are selected
VARIABLES = {
    "model": ".*",
    "version": ".*",
    "instance": ".*",
    "__rate_interval": "1m",
    "__interval": "1m",
    "__range": "1h",
}

STRING = r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`"""
NAME = r"[A-Za-z_:][A-Za-z0-9_:]*"
TOKEN = re.compile(
    rf"(?P<comment>\#[^\n]*)|(?P<string>{STRING})|(?P<range>\[[^\]]*\])|(?P<number>(?:0[xX])?\.?\d[\w.]*(?:(?<=[eE])[+-]\d+)?)"
    rf"|(?P<name>{NAME})|(?P<space>\s+)|(?P<operator>[=!]~|[=!<>]=|[-+*/%^<>=(){{}},@])"
)
OPERATORS = {"and", "or", "unless", "atan2", "bool", "inf", "nan"}
LABEL_LISTS = {"by", "without", "on", "ignoring", "group_left", "group_right"}


def queries() -> dict[str, str]:
    """Map the place of each expression (panel, variable, annotation or rule) to the expression, ready to execute."""
    found = {}
    for path in sorted(DASHBOARDS.glob("*.json")):
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        for origin, expression in expressions(dashboard):
            found[f"{path.name}: {origin}"] = substitute(expression)
    for path, rule in rules():
        found[f"{path.name}: {rule.get('alert') or rule['record']}"] = rule["expr"]
    return found


def rules() -> list[tuple[Path, dict]]:
    """List every recording and alerting rule with its file."""
    return [
        (path, rule)
        for path in sorted((PROMETHEUS / "rules").glob("*.yml"))
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]


def recorded() -> set[str]:
    """Return the metrics that recording rules define."""
    return {rule["record"] for _, rule in rules() if "record" in rule}


def panels(dashboard: dict) -> Iterator[dict]:
    """Yield all panels: rows, and the panels in collapsed rows, too."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", [])


def expressions(dashboard: dict) -> Iterator[tuple[str, str]]:
    """Yield the place and the expression of each query of a dashboard."""
    row = ""
    for panel in panels(dashboard):
        if panel["type"] == "row":
            row = panel["title"]
        for target in panel.get("targets", []):
            yield f"{row} / {panel['title']} / {target['refId']}", target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield f"${variable['name']}", selector(variable["query"]["query"])
    for annotation in dashboard["annotations"]["list"]:
        if "target" in annotation:
            yield annotation["name"], annotation["target"]["expr"]


def selector(query: str) -> str:
    """Extract `up{job="a"}` from `label_values(up{job="a"}, instance)`, which only Grafana understands."""
    match = re.fullmatch(r"label_values\((.+),\s*\w+\)", query)
    if match is None:
        raise ValueError(f"not a label_values() of a metric: {query}")
    return match[1]


def substitute(expression: str) -> str:
    """Replace `$name`, `${name}` and `${name:format}` by the variable's value.

    Raises:
        KeyError: `VARIABLES` lacks a variable.
    """
    return re.sub(r"\$(?:\{([A-Za-z_]\w*)(?::\w+)?\}|([A-Za-z_]\w*))", lambda m: VARIABLES[m[1] or m[2]], expression)


def metric_names(expression: str) -> set[str]:
    """Find the metrics that a PromQL expression reads.

    Raises:
        ValueError: the expression is not valid PromQL, or selects metrics by a pattern.
    """
    found, tokens = set(), tokenize(expression)
    index = 0
    while index < len(tokens):
        kind, text = tokens[index]
        following = tokens[index + 1][1] if index + 1 < len(tokens) else ""
        if text == "{":
            end = tokens.index(("operator", "}"), index)
            found |= named(tokens[index + 1 : end])
            index = end
        elif kind == "name" and text.lower() in LABEL_LISTS:
            if following == "(":
                index = tokens.index(("operator", ")"), index)
        elif kind == "name" and text.lower() == "offset":
            index += 2 if following == "-" else 1  # the duration after it looks like a number
        elif kind == "name" and text.lower() not in OPERATORS and not is_call(tokens, index):
            found.add(text)
        index += 1
    return found


def is_call(tokens: list[tuple[str, str]], index: int) -> bool:
    """Tell whether the name is that of a function, `rate(...)`, or aggregation, `sum by (...) (...)`."""
    following = tokens[index + 1][1].lower() if index + 1 < len(tokens) else ""
    return following in {"(", "by", "without"}


def named(matchers: list[tuple[str, str]]) -> set[str]:
    """Find the metrics that are named as `{__name__="up", ...}`."""
    found = set()
    for (_, label), (_, operator), (_, value) in zip(matchers, matchers[1:], matchers[2:], strict=False):
        if label == "__name__":
            if operator != "=":
                raise ValueError(f"metrics chosen by a pattern: __name__{operator}{value}")
            found.add(value[1:-1])
    return found


def tokenize(expression: str) -> list[tuple[str, str]]:
    tokens, position = [], 0
    while position < len(expression):
        match = TOKEN.match(expression, position)
        if match is None:
            raise ValueError(f"no PromQL at {expression[position:]!r}")
        if match.lastgroup not in {"space", "comment", "range"}:
            tokens.append((match.lastgroup, match[0]))
        position = match.end()
    return tokens


def promtool_checks(folder: Path | str = PROMETHEUS) -> list[list[str]]:
    """List the arguments of each promtool run that must succeed.

    Args:
        folder: where docker/prometheus is, on this machine or in a container.
    """
    rule_files = [f"{folder}/rules/{path.name}" for path in sorted((PROMETHEUS / "rules").glob("*.yml"))]
    test_files = [f"{folder}/tests/{path.name}" for path in sorted((PROMETHEUS / "tests").glob("*.yml"))]
    return [
        ["check", "config", "--lint=all", "--lint-fatal", f"{folder}/prometheus.yml"],
        ["check", "rules", "--lint=all", "--lint-fatal", *rule_files],
        ["test", "rules", *test_files],
    ]
