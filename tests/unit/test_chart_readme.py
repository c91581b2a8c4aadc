"""The values and commands in kubernetes/README.md are accepted by the chart."""

import re

from bundle.paths import ROOT
from tests.helm import CHART, DIGEST, RELEASE, containers, helm, needs_helm, of_kind, pods, render

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
