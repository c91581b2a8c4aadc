"""The values and commands in kubernetes/README.md are accepted by the chart."""

import re

from bundle.paths import ROOT
from tests.helm import CHART, DIGEST, RELEASE, SCHEMA, containers, helm, needs_helm, of_kind, pods, render, resolved

pytestmark = needs_helm
README = (ROOT / "kubernetes" / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the contents of the blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_canary_of_the_readme_is_promoted_and_removed():
    """As in the pipeline of the README: the tests ask both tracks, and neither end leaves anything of the canary."""
    [canary] = [block for block in blocks("yaml") if block.startswith("# canary.yaml")]
    tracks = of_kind(render(canary), "Deployment").keys()
    assert tracks == {"bundle-main", "bundle-main-canary"}
    tests = of_kind(render(canary), "Pod")
    asked = {pod["spec"]["containers"][0]["args"][1] for pod in tests.values()}
    assert asked == {f"http://{name}:80" for name in tracks}
    promoted = render("image: {tag: 0.3.0}")
    assert of_kind(promoted, "Deployment").keys() == of_kind(render(""), "Deployment").keys() == {"bundle-main"}
    assert containers(dict(pods(promoted))["bundle-main"])["torchserve"]["image"] == "torchserve-bundle:0.3.0"


def test_values_of_the_readme_are_accepted():
    values = [block.replace("9f86...", DIGEST) for block in blocks("yaml")]
    assert len(values) >= 3
    for block in values:
        assert render(block)
    commands = re.findall(r"^(?:helm install|upgrade=).*", "\n".join(blocks("sh")), re.MULTILINE)
    given = {word for word in re.findall(r"--set ([\w.,=:/-]+)", README) if "pem" not in word}
    assert len(commands) >= 3
    assert len(given) >= 3
    for word in given:
        done = helm("template", RELEASE, str(CHART), "--set", word)
        assert done.returncode == 0, done.stderr


def inside(schema: dict) -> dict[str, dict]:
    """Return what a value may contain, by key; NAME stands for any key."""
    other = schema.get("additionalProperties")
    return schema.get("properties", {}) | ({"NAME": other} if isinstance(other, dict) else {})


def is_accepted(path: str) -> bool:
    found = SCHEMA
    for key in path.split("."):
        allowed = inside(resolved(found))
        if (found := allowed.get(key, allowed.get("NAME"))) is None:
            return False
    return True


def keys(schema: dict) -> set[str]:
    """Return the names of all values in a part of the schema."""
    parts = inside(resolved(schema))
    return set(parts).union(*(keys(part) for part in parts.values()))


def test_every_key_in_the_readme_is_a_path_that_the_chart_accepts():
    """A key without its path, such as `preStopSeconds`, would be refused if a reader gave it to --set."""
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    quoted = re.findall(r"`(?:--set(?:-file)? )?([^`\s]+?)(?:[=:][^`]*)?`", text)
    files = r".*\.(yaml|py|mar|crt|pkg\.dev)"
    paths = {each for each in quoted if re.fullmatch(r"\w+(\.\w+)+", each) and not re.fullmatch(files, each)}
    assert len(paths) >= 20
    assert {path for path in paths if not is_accepted(path)} == set()
    long = {key for key in keys(SCHEMA) - SCHEMA["properties"].keys() if re.search("[a-z][A-Z]", key)}
    assert "preStopSeconds" in long
    assert long & set(quoted) == set()
