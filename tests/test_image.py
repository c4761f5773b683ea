"""docker/Dockerfile, read as text: what each variant has, without a daemon."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from conftest import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"


@dataclass
class BuildStage:
    """A FROM and the instructions below it, (name, rest of the line) each."""

    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all_of(self, name: str) -> list[str]:
        return [rest for instruction, rest in self.instructions if instruction == name]

    @property
    def environment(self) -> dict[str, str]:
        return dict(part.split("=", 1) for rest in self.all_of("ENV") for part in shlex.split(rest))

    @property
    def folders(self) -> dict[str, str]:
        """Mode by folder that ``install -d`` makes."""
        found: dict[str, str] = {}
        for command in re.findall(r"install -d ([^&]+)", " ".join(self.all_of("RUN"))):
            words = shlex.split(command)
            mode = words[words.index("-m") + 1]
            found |= {word: mode for word in words if word.startswith("/")}
        return found

    @property
    def packages(self) -> set[str]:
        return {
            word
            for command in re.findall(r"apt-get install ([^&;}]+)", " ".join(self.all_of("RUN")))
            for word in shlex.split(command)
            if not word.startswith("-")
        }


def read_stages(text: str) -> list[BuildStage]:
    """The stages of a Dockerfile; comments are left out, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: list[BuildStage] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stages.append(BuildStage(rest.partition(" AS ")[2]))
        elif name and stages:
            stages[-1].instructions.append((name, rest.strip()))
    return stages


@pytest.fixture(scope="module")
def stages() -> dict[str, BuildStage]:
    return {stage.name: stage for stage in read_stages(DOCKERFILE.read_text())}


def test_kernels_can_be_compiled_and_cached_by_any_user(stages: dict[str, BuildStage]) -> None:
    run = stages["run"]
    assert {"gcc", "g++", "libc6-dev", "python3-dev"} <= run.packages
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert run.folders.get(run.environment[name]) == "1777", f"{name} is made, and writable with any --user"
    for command in run.all_of("RUN"):
        assert ("apt-get update" in command) == ("rm -rf /var/lib/apt/lists/*" in command), "no package lists are left"


def test_the_image_runs_as_a_numbered_user_that_is_not_root(stages: dict[str, BuildStage]) -> None:
    names = [name for name, _ in stages["run"].instructions]
    user = stages["run"].all_of("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "Kubernetes' runAsNonRoot needs a number"
    assert "RUN" not in names[names.index("USER") :], "what needs root comes before"
    assert stages["run"].folders["/workspace/runs"] == "1777"


def test_both_variants_install_the_pinned_torch_and_share_the_rest(stages: dict[str, BuildStage]) -> None:
    import tomllib

    (torch,) = (rest for rest in stages["build"].all_of("RUN") if "$VARIANT" in rest)
    cases = dict(re.findall(r"(\w+)\) pip install \"torch==\$version(\+cpu)?\"", torch))
    assert cases == {"cuda": "", "cpu": "+cpu"}
    assert [rest for rest in stages["build"].all_of("ARG") if rest.startswith("VARIANT")] == ["VARIANT=cuda"]
    assert "VARIANT" not in " ".join(rest for _, rest in stages["run"].instructions), "both have the same compiler"
    pins = dict(line.split("==") for line in (ROOT / "docker/constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for requirement in map(Requirement, project):
        versions = {name.lower().replace("-", "_"): value for name, value in pins.items()}
        pinned = versions.get(requirement.name.lower().replace("-", "_"))
        assert pinned is not None, f"{requirement.name} is not pinned"
        assert Version(pinned) in requirement.specifier, f"{requirement.name}=={pinned} is outside of pyproject.toml"


def test_nothing_secret_is_in_it_and_what_is_copied_exists(stages: dict[str, BuildStage]) -> None:
    for stage in stages.values():
        assert not [name for name in stage.environment if re.search("TOKEN|KEY|SECRET|PASSWORD", name)]
        for rest in stage.all_of("COPY"):
            if "--from=" not in rest:
                *sources, _ = [word for word in shlex.split(rest) if not word.startswith("--")]
                assert all((ROOT / source).exists() for source in sources), rest
