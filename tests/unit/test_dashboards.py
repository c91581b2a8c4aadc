"""Dashboards, rules and alerts: the metrics that they query exist, and promtool accepts them."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.queries import (
    DASHBOARDS,
    GRAFANA,
    PROMETHEUS,
    ROOT,
    metric_names,
    panels,
    promtool_checks,
    queries,
    recorded,
    rules,
    substitute,
)

# metrics of Prometheus itself, and of NVIDIA's exporter
FOREIGN = {"up", "ALERTS", "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE"}
ALERTS = [rule for _, rule in rules() if "alert" in rule]
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
PROMTOOL = shutil.which("promtool")


def declared() -> set[str]:
    """Return the series that TorchServe and the handlers export, by metrics.yaml."""
    config = yaml.safe_load((ROOT / "bundle/config/metrics.yaml").read_text(encoding="utf-8"))
    names = set()
    for section, kinds in config.items():
        if section == "dimensions":
            continue
        for kind, metrics in kinds.items():
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            names |= {metric["name"] + suffix for metric in metrics for suffix in suffixes}
    return names


@pytest.fixture(params=sorted(DASHBOARDS.glob("*.json")), ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def dashboard(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# --- the reader of expressions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("up", {"up"}),
        ("1 + 2e3 * 0x1F - .5e-3 ^ Inf", set()),
        ("rate(a_total[5m])", {"a_total"}),
        ("sum by (model, le) (rate(a_bucket{code=~'5..', x!~\"b(c)\"}[1m:15s] offset -5m))", {"a_bucket"}),
        ("sum(a) without(b)", {"a"}),
        ("a > on (b) group_left (c) d:e:f", {"a", "d:e:f"}),
        ("a * on (b) group_right d", {"a", "d"}),
        ("a == bool 1 AND b unless c or vector(0)", {"a", "b", "c"}),
        ('{__name__="a", b="c"} / {b="c", __name__="d"}', {"a", "d"}),
        ('label_replace(a, "b", "$1", "c", "(.*)")', {"a"}),
        ("a @ end() # b\n + `c`", {"a"}),
        ("quantile_over_time(0.9, a[1h]) offset 1h30m", {"a"}),
        ("by_the_way + offset_seconds + rate", {"by_the_way", "offset_seconds", "rate"}),
        ("count_values without (b) ('c', a)", {"a"}),
        ("histogram_quantile(0.99, sum(a) by (le)) >= 0", {"a"}),
    ],
)
def test_metric_names_of_an_expression_are_found(expression, names):
    assert metric_names(expression) == names


@pytest.mark.parametrize("expression", ['{__name__=~"a|b"}', "a ? b", 'a{b="c]'])
def test_metric_names_of_an_unreadable_expression_raise(expression):
    with pytest.raises(ValueError, match="metrics chosen by a pattern|no PromQL"):
        metric_names(expression)


def test_variables_of_grafana_are_substituted():
    assert substitute('a{b=~"$model", c=~"${version:regex}"}[$__rate_interval]') == 'a{b=~".*", c=~".*"}[1m]'
    assert substitute('label_replace(a, "b", "$1", "c", "(.*)$")') == 'label_replace(a, "b", "$1", "c", "(.*)$")'
    with pytest.raises(KeyError, match="unknown"):
        substitute("a[$unknown]")


# --- queried metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("origin", "expression"), queries().items(), ids=queries().keys())
def test_every_query_names_metrics_that_exist(origin, expression):
    from bundle.supervisor.exporter import METRICS

    names = metric_names(expression)
    assert names
    assert names - declared() - set(METRICS) - recorded() - FOREIGN == set()


def test_every_recording_rule_is_read():
    """A panel, an alert or another rule reads it."""
    assert recorded() - set().union(*map(metric_names, queries().values())) == set()


# --- dashboards ------------------------------------------------------------------------------------------------------


def test_panels_have_unique_ids_and_titles(dashboard):
    every = list(panels(dashboard))
    assert len({panel["id"] for panel in every}) == len(every)
    assert len({(panel["type"] == "row", panel["title"]) for panel in every}) == len(every)


def test_panels_have_a_description_and_the_provisioned_data_source(dashboard):
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert [{key: source[key] for key in DATASOURCE} for source in provisioned] == [DATASOURCE]
    for panel in panels(dashboard):
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert [target["datasource"] for target in [panel, *panel["targets"]]] == [DATASOURCE] * (
                1 + len(panel["targets"])
            )
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references), panel["title"]


def test_panels_do_not_overlap(dashboard):
    taken = set()
    for panel in panels(dashboard):
        place = panel["gridPos"]
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        assert columns.stop <= 24, panel["title"]
        cells = set(itertools.product(columns, lines))
        assert not cells & taken, panel["title"]
        taken |= cells


def test_interval_of_the_data_source_is_the_scrape_interval():
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


# --- alerts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_has_a_severity_a_summary_and_a_runbook(alert):
    assert alert["labels"]["severity"] in {"warning", "critical"}
    assert alert["annotations"].keys() == {"summary", "description", "runbook"}
    assert "{{ $" in alert["annotations"]["summary"]
    assert "\n" not in alert["annotations"]["runbook"].strip()


def test_every_rule_is_tested():
    """Each alert fires in one test and stays silent in another. A recording rule is tested, or a rule that reads it."""
    suites = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (PROMETHEUS / "tests").glob("*.yml")]
    tests = [test for suite in suites for test in suite["tests"]]
    asked = {
        (case["alertname"], bool(case.get("exp_alerts"))) for test in tests for case in test.get("alert_rule_test", [])
    }
    assert asked == {(alert["alert"], fires) for alert in ALERTS for fires in (True, False)}
    evaluated = [metric_names(case["expr"]) for test in tests for case in test.get("promql_expr_test", [])]
    read = [metric_names(rule["expr"]) for _, rule in rules() if rule.get("record") in set().union(*evaluated)]
    assert recorded() - set().union(*evaluated, *read) == set()


# --- promtool --------------------------------------------------------------------------------------------------------


@pytest.fixture
def prometheus(tmp_path) -> Path:
    """Return a copy of docker/prometheus with the GPU target, as the GPU override mounts it."""
    folder = shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    shutil.copy(folder / "gpu" / "gpu.yml", folder / "targets")
    return folder


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool on the PATH (it comes with Prometheus)")
@pytest.mark.parametrize("index", range(len(promtool_checks())), ids=[" ".join(c[:2]) for c in promtool_checks()])
def test_promtool_accepts_the_configuration_and_rules(prometheus, index):
    done = subprocess.run([PROMTOOL, *promtool_checks(prometheus)[index]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
