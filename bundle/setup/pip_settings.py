"""Read pip's settings, and hand them over to uv, which reads neither pip's files nor its variables."""

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

# uv's variable for each option of pip, and what separates several values
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", ""),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "timeout": ("UV_HTTP_TIMEOUT", ""),
    "default-timeout": ("UV_HTTP_TIMEOUT", ""),
    "retries": ("UV_HTTP_RETRIES", ""),
    "cert": ("SSL_CERT_FILE", ""),
    "client-cert": ("SSL_CLIENT_CERT", ""),
}
ALIASES = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}  # uv's older names
SOURCES = ("index-url", "extra-index-url", "find-links", "no-index")  # where packages come from
# options that change neither which packages are installed nor where from
NEUTRAL = {
    "break-system-packages", "cache-dir", "compile", "config-file", "debug", "disable-pip-version-check",
    "exists-action", "format", "log", "no-build-isolation", "no-cache-dir", "no-color", "no-compile", "no-index",
    "no-input", "no-python-version-warning", "no-warn-conflicts", "no-warn-script-location", "progress-bar", "proxy",
    "quiet", "require-virtualenv", "root-user-action", "use-feature", "verbose",
}  # fmt: skip
FALSE = {"", "0", "false", "no", "off"}


@dataclass(frozen=True)
class PipSettings:
    """What pip's files and its environment variables set, by the option's long name."""

    values: Mapping[str, str]

    @classmethod
    def read(cls) -> "PipSettings":
        """Ask this Python's pip; without a pip, nothing is set."""
        command = [sys.executable, "-m", "pip", "config", "list"]
        loud = {**os.environ, "PIP_QUIET": "0"}  # with the setting `quiet`, pip would list nothing
        asked = subprocess.run(command, capture_output=True, text=True, env=loud)
        return cls(parse(asked.stdout if asked.returncode == 0 else ""))

    @property
    def no_index(self) -> bool:
        return self.values.get("no-index", "").lower() not in FALSE

    @property
    def replaces_pypi(self) -> bool:
        """Whether packages come from elsewhere: another index, or folders of wheels."""
        named = [self.values.get("index-url"), *map(os.environ.get, ("UV_DEFAULT_INDEX", "UV_INDEX_URL"))]
        return self.no_index or any(index and index.rstrip("/") != pypi() for index in named)

    @property
    def not_known_to_uv(self) -> list[str]:
        """Options that could change what is installed, and that uv does not get."""
        return sorted(self.values.keys() - VARIABLES.keys() - NEUTRAL)

    def for_uv(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return variables that tell uv the same; what the environment sets for uv itself comes first."""
        told: dict[str, str] = {}
        for option, value in self.values.items():
            if option in VARIABLES:
                name, separator = VARIABLES[option]
                told[name] = separator.join(value.split()) if separator else value
        if proxy := self.values.get("proxy"):
            told |= {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy}
        if self.values.get("no-cache-dir", "").lower() not in FALSE:
            told["UV_NO_CACHE"] = "1"
        if told.keys() & {"UV_INDEX", "UV_FIND_LINKS"}:
            told["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip's: the best version of all indexes
        if extra := told.get("UV_INDEX"):
            # of equal versions, uv takes that of the first index, even if its wheel suits the system less
            own = environment.get("UV_DEFAULT_INDEX") or environment.get("UV_INDEX_URL")
            told["UV_INDEX"] = f"{own or self.values.get('index-url') or pypi()} {extra}".strip()
        # pip trusts the system's certificates, too
        told["UV_SYSTEM_CERTS"] = "1"
        return {
            name: value
            for name, value in told.items()
            if not {name, name.lower(), ALIASES.get(name, name)} & environment.keys()
        }

    def for_pip(self) -> dict[str, str]:
        """Return variables for a pip that reads no files: all settings, except where packages come from."""
        kept = {option: value for option, value in self.values.items() if option not in (*SOURCES, "config-file")}
        return {f"PIP_{option.upper().replace('-', '_')}": value for option, value in kept.items()}


@functools.cache
def pypi() -> str:
    """Return the URL of the index that pip uses without settings, which its help shows; "" without a pip."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    plain |= {"PIP_CONFIG_FILE": os.devnull, "COLUMNS": "1000"}  # in one line
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, env=plain)
    found = re.search(r"--index-url .+\(default (\S+)\)", shown.stdout)
    return found[1] if found else ""


def parse(listed: str) -> dict[str, str]:
    """Return the options that `pip config list` printed; those of `pip install` and of the environment come first."""
    values: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.partition(".")
        if section in values and (setting := str(ast.literal_eval(value))):  # pip, too, ignores what is empty
            values[section][option] = setting
    return values["global"] | values["install"] | values[":env:"]
