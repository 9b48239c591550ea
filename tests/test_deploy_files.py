"""The files under deploy/ keep the promises of their README; no container engine is needed.

Every kind of file has the strictest reader that there is for it (hadolint, the compose
specification's schema, systemd-analyze, nft, nginx), and beside it the promises that no such reader
knows of: which process has a network, which has the data, what the two share.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import typer

from hospitium_client.policy import NEW_POLICY, SitePolicy
from hospitium_client.settings import SiteHome
from hospitium_client.settings import settings_text as site_text
from hospitium_common.cli import _application
from hospitium_common.toml_file import read_toml
from hospitium_server.settings import CoordinatorHome
from hospitium_server.settings import settings_text as coordinator_text

DEPLOY = Path(__file__).parent.parent / "deploy"
UNITS = ("trainer", "node", "coordinator")
COMPOSE = ("compose.coordinator.yaml", "compose.site.yaml")
# systemd-analyze counts from 0 (sealed) to 100; a unit without any hardening has 92 to 96.
LARGEST_EXPOSURE = {"trainer": 8, "node": 15, "coordinator": 15}


def tool(name: str) -> str:
    """Return a program beside this Python or on the path, or skip."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=60, check=False
    )


# --- images --------------------------------------------------------------------------------------


def instructions(text: str) -> list[tuple[str, str]]:
    """Split a Dockerfile into (instruction, rest)."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    logical = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word.upper(), rest.strip()) for word, _, rest in (s.partition(" ") for s in logical)]


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """Return the instructions of each named stage, its ancestors' first."""
    found: dict[str, list[tuple[str, str]]] = {}
    current = ""
    for word, rest in instructions(text):
        if word == "FROM":
            base, _, current = rest.partition(" AS ")
            found[current] = list(found.get(base, []))
        if current:
            found[current].append((word, rest))
    return found


def test_hadolint_has_nothing_to_say() -> None:
    result = run(tool("hadolint"), "--failure-threshold", "style", DEPLOY / "Dockerfile")
    assert (result.returncode, result.stdout) == (0, ""), result.stdout


def test_hadolint_does_object_to_a_root_user(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text((DEPLOY / "Dockerfile").read_text().replace("USER 10001:10001", "USER root"))
    result = run(tool("hadolint"), "--failure-threshold", "style", bad)
    assert result.returncode != 0
    assert "DL3002" in result.stdout


@pytest.mark.parametrize("target", ["coordinator", "node", "trainer"])
def test_every_image_runs_as_its_own_user_and_says_whether_it_is_well(target: str) -> None:
    stage = stages((DEPLOY / "Dockerfile").read_text())[target]
    assert stage[0] == ("FROM", "${PYTHON_IMAGE} AS runtime")
    user = [rest for word, rest in stage if word == "USER"]
    assert len(user) == 1
    assert int(user[0].split(":")[0]) > 10_000
    assert [word for word, _ in stage].count("HEALTHCHECK") == 1
    # Exec form: a signal reaches the program, and no shell is needed.
    assert [rest for word, rest in stage if word == "ENTRYPOINT"] == ['["hospitium"]']


def test_the_base_image_is_pinned_and_no_secret_is_built_in() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    bases = [rest for word, rest in instructions(text) if word == "ARG" and "IMAGE" in rest]
    assert len(bases) == 1
    tag = bases[0].rpartition(":")[2]
    assert tag.count(".") == 2, "expected the base pinned to one release"
    assert "slim" in tag
    for word, rest in instructions(text):
        if word in ("ENV", "ARG"):
            name = rest.partition("=")[0].lower()
            assert not any(part in name for part in ("password", "passphrase", "secret", "token"))
        if word in ("COPY", "ADD"):
            assert ".key" not in rest
            assert ".pem" not in rest


def test_only_source_enters_a_build() -> None:
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    rules = [rule for rule in rules if rule == "*" or rule[0] in "!*"]
    assert rules[0] == "*"
    copied = [
        rest.split()[:-1]
        for word, rest in instructions((DEPLOY / "Dockerfile").read_text())
        if word == "COPY" and not rest.startswith("--from")
    ]
    allowed = {rule[1:].split("/")[0] for rule in rules if rule.startswith("!")}
    assert {part for parts in copied for part in parts} == allowed
    assert all((DEPLOY.parent / name).exists() for name in allowed)
    # What must never enter is excluded again after what may.
    after = rules[max(i for i, rule in enumerate(rules) if rule.startswith("!")) :]
    assert {"**/*.key", "**/*.pem", "**/*.keys", "**/*.sqlite"} <= set(after)


# --- compose -------------------------------------------------------------------------------------


def services(name: str) -> dict[str, dict]:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed here")
    return yaml.safe_load((DEPLOY / name).read_text())["services"]


def weaknesses(service: dict) -> list[str]:
    """Say which promise that all three services make this one breaks."""
    swap = service.get("memswap_limit")
    promises = {
        "a user other than root": int(str(service.get("user", "0")).split(":")[0]) > 10_000,
        "a read-only root": service.get("read_only") is True,
        "no capability": service.get("cap_drop") == ["ALL"] and "cap_add" not in service,
        "no new privileges": service.get("security_opt") == ["no-new-privileges:true"],
        "no privilege": not {"privileged", "pid", "devices", "userns_mode"} & service.keys(),
        "a limit on memory, and no swap": swap is not None and swap == service.get("mem_limit"),
        "a limit on processes": 0 < service.get("pids_limit", 0) <= 512,
        "no core dump": service.get("ulimits") == {"core": 0},
        "no program in /tmp": all("noexec" in place for place in service.get("tmpfs", ())),
        "no secret in the environment": "environment" not in service,
        "its own IPC": service.get("ipc") == "private",
        "bounded logs": "max-size" in service.get("logging", {}).get("options", {}),
        "mounts that must exist already": all(
            one["type"] == "volume" or one["bind"] == {"create_host_path": False}
            for one in service["volumes"]
        ),
        "no container engine inside": "docker.sock" not in str(service),
    }
    return [promise for promise, kept in promises.items() if not kept]


def leaks(trainer: dict, node: dict) -> list[str]:
    """Say how patient data could leave a pair of services."""
    writable = {one["source"] for one in trainer["volumes"] if not one.get("read_only")}
    seen = {one["source"] for one in node["volumes"]}
    data = [one for one in trainer["volumes"] if "HOSPITIUM_DATA" in one["source"]]
    named = {one["source"] for one in trainer["volumes"] if one["type"] == "volume"}
    promises = {
        "the trainer has no network": trainer.get("network_mode") == "none"
        and not {"networks", "ports", "links", "extra_hosts", "dns"} & trainer.keys(),
        "data is mounted read-only": len(data) == 1 and data[0].get("read_only") is True,
        "the node sees no data": not any("HOSPITIUM_DATA" in source for source in seen),
        "only the socket's directory is shared": writable & seen == {"socket"} == named,
        "the node sees nothing of the site's home": not any("SITE_HOME" in one for one in seen),
        "the node listens to nobody": not {"ports", "network_mode", "expose"} & node.keys(),
        "two users": trainer["user"] != node["user"],
    }
    return [promise for promise, kept in promises.items() if not kept]


@pytest.mark.parametrize("name", [*COMPOSE, "compose.site.cuda.yaml"])
def test_compose_files_follow_the_specification(name: str) -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed here")
    schema = ("--builtin-schema", "vendor.compose-spec")
    result = run(sys.executable, "-m", "check_jsonschema", *schema, DEPLOY / name)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", COMPOSE)
def test_every_service_is_hardened(name: str) -> None:
    assert {key: weaknesses(one) for key, one in services(name).items() if weaknesses(one)} == {}


def test_patient_data_has_no_way_out_of_the_site() -> None:
    site = services("compose.site.yaml")
    assert set(site) == {"trainer", "node"}
    assert leaks(site["trainer"], site["node"]) == []


def test_the_cuda_variant_changes_no_promise() -> None:
    changed = services("compose.site.cuda.yaml")["trainer"]
    assert set(changed) == {"image", "build", "deploy"}


@pytest.mark.parametrize(
    ("key", "value", "promise"),
    [
        ("user", "0:0", "a user other than root"),
        ("read_only", False, "a read-only root"),
        ("cap_add", ["NET_ADMIN"], "no capability"),
        ("security_opt", [], "no new privileges"),
        ("privileged", True, "no privilege"),
        ("memswap_limit", "99g", "a limit on memory, and no swap"),
        ("environment", {"PASSPHRASE": "x"}, "no secret in the environment"),
    ],
)
def test_a_weakened_service_is_noticed(key: str, value: object, promise: str) -> None:
    trainer = services("compose.site.yaml")["trainer"]
    assert weaknesses({**trainer, key: value}) == [promise]


def test_a_trainer_with_a_network_or_a_node_with_data_is_noticed() -> None:
    site = services("compose.site.yaml")
    networked = {**site["trainer"], "network_mode": "bridge"}
    assert leaks(networked, site["node"]) == ["the trainer has no network"]
    curious = copy.deepcopy(site["node"])
    curious["volumes"].append(site["trainer"]["volumes"][1])
    assert leaks(site["trainer"], curious) == ["the node sees no data"]
    curious["volumes"][-1] = site["trainer"]["volumes"][0]
    assert "only the socket's directory is shared" in leaks(site["trainer"], curious)


# --- systemd -------------------------------------------------------------------------------------


def directives(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / f"hospitium-{unit}.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_every_line_of_the_units(unit: str, tmp_path: Path) -> None:
    # The program is not installed where the units expect it; everything else is checked as it is.
    text = (DEPLOY / "systemd" / f"hospitium-{unit}.service").read_text()
    for other in UNITS:
        source = DEPLOY / "systemd" / f"hospitium-{other}.service"
        here = source.read_text().replace("/opt/hospitium/bin/hospitium", sys.executable)
        here = here.replace("/opt/hospitium/share", str(DEPLOY))
        (tmp_path / source.name).write_text(here)
    assert "/opt/hospitium/bin/hospitium" in text
    result = run(
        tool("systemd-analyze"), "verify", "--man=no", tmp_path / f"hospitium-{unit}.service"
    )
    # An unknown key only warns, so nothing may be said at all about our files.
    said = [line for line in result.stderr.splitlines() if "hospitium" in line]
    assert (result.returncode, said) == (0, [])


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_rates_the_units_as_sealed(unit: str, tmp_path: Path) -> None:
    systemd_analyze = tool("systemd-analyze")
    source = DEPLOY / "systemd" / f"hospitium-{unit}.service"

    def rated(path: Path) -> subprocess.CompletedProcess[str]:
        limit = f"--threshold={LARGEST_EXPOSURE[unit]}"
        return run(systemd_analyze, "security", "--offline=true", "--no-pager", limit, path)

    result = rated(source)
    assert result.returncode == 0, result.stdout[-300:] + result.stderr
    weaker = tmp_path / source.name
    weaker.write_text(source.read_text().replace("CapabilityBoundingSet=\n", ""))
    assert rated(weaker).returncode != 0


def test_the_trainer_unit_has_no_network_and_reads_data_only() -> None:
    trainer = directives("trainer")
    assert trainer["PrivateNetwork"] == ["yes"]
    assert trainer["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert trainer["ReadWritePaths"] == ["/var/lib/hospitium/site /run/hospitium"]
    assert trainer["ReadOnlyPaths"] == ["/srv/hospitium/data"]
    # Patient data reaches neither a core dump nor a swap disk.
    assert trainer["LimitCORE"] == ["0"]
    assert trainer["MemorySwapMax"] == ["0"]


def test_the_node_unit_sees_neither_data_nor_the_secrets_of_the_site() -> None:
    node = directives("node")
    hidden = node["InaccessiblePaths"][0].split()
    assert {"-/srv/hospitium/data", "-/var/lib/hospitium/site"} <= set(hidden)
    assert "ReadWritePaths" not in node
    assert node["StateDirectory"] == ["hospitium/node"]
    assert node["SocketBindDeny"] == ["any"]


def test_the_units_share_the_group_of_the_socket_and_nothing_else() -> None:
    users = {unit: directives(unit)["User"] for unit in UNITS}
    assert len({user for (user,) in users.values()}) == 3
    assert directives("trainer")["SupplementaryGroups"] == ["hospitium-socket"]
    assert directives("node")["SupplementaryGroups"] == ["hospitium-socket"]
    for unit in UNITS:
        found = directives(unit)
        assert found["Group"] == found["User"]
        for key, value in (
            ("NoNewPrivileges", "yes"),
            ("ProtectSystem", "strict"),
            ("ProtectHome", "yes"),
            ("PrivateTmp", "yes"),
            ("CapabilityBoundingSet", ""),
            ("UMask", "0077"),
            ("LimitCORE", "0"),
        ):
            assert found[key] == [value], f"{unit}: {key}"


def test_users_and_directories_are_made_as_the_units_expect(tmp_path: Path) -> None:
    systemd = DEPLOY / "systemd"
    (tmp_path / "etc").mkdir()
    made = run(tool("systemd-sysusers"), f"--root={tmp_path}", systemd / "hospitium.sysusers.conf")
    assert made.returncode == 0, made.stderr
    passwd = (tmp_path / "etc/passwd").read_text().splitlines()
    assert {line.split(":")[0] for line in passwd} == {f"hospitium-{unit}" for unit in UNITS}
    assert all(line.endswith("nologin") for line in passwd)
    groups = {line.split(":")[0]: line.split(":")[3]
              for line in (tmp_path / "etc/group").read_text().splitlines()}  # fmt: skip
    members = set(groups["hospitium-socket"].split(","))
    assert members == {"hospitium-trainer", "hospitium-node"}
    tmpfiles = tool("systemd-tmpfiles")
    run(tmpfiles, "--create", f"--root={tmp_path}", systemd / "hospitium.tmpfiles.conf")
    assert (tmp_path / "var/lib/hospitium/site").stat().st_mode & 0o7777 == 0o700
    assert (tmp_path / "var/lib/hospitium/coordinator").stat().st_mode & 0o7777 == 0o700
    assert (tmp_path / "run/hospitium").stat().st_mode & 0o7777 == 0o2750


def test_the_node_is_given_three_files_of_the_site_and_no_other(tmp_path: Path) -> None:
    site, node = tmp_path / "site", tmp_path / "node"
    for name in (
        "site.toml", "policy.toml", "keys/site.keys", "keys/node.key", "pinned/ca.pem",
        "pinned/roster.json", "ledger.sqlite",
    ):  # fmt: skip
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(name)
    script = DEPLOY / "node-home.sh"
    owner = str(os.getuid())
    for _ in range(2):  # again at every start
        made = run(script, site, node, owner)
        assert made.returncode == 0, made.stderr
    files = {str(file.relative_to(node)) for file in node.rglob("*") if file.is_file()}
    assert files == {"site.toml", "keys/node.key", "pinned/ca.pem"}
    assert all((node / name).stat().st_mode & 0o777 == 0o400 for name in files)
    assert node.stat().st_mode & 0o777 == 0o700
    (site / "pinned/ca.pem").unlink()
    refused = run(script, site, node, owner)
    assert refused.returncode == 1
    assert "pinned/ca.pem: expected" in refused.stderr


@pytest.mark.parametrize(
    ("command", "user"),
    [
        (["site", "init", "St. Anna"], "hospitium-trainer"),
        (["data", "check"], "hospitium-trainer"),
        (["coordinator", "roster"], "hospitium-coordinator"),
        (["study", "list"], "hospitium-coordinator"),
    ],
)
def test_each_command_is_run_as_the_user_of_its_home(
    command: list[str], user: str, tmp_path: Path
) -> None:
    seen = tmp_path / "runuser"
    seen.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    seen.chmod(0o755)
    done = subprocess.run(
        [DEPLOY / "hospitium.sh", *command], capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    words = done.stdout.splitlines()
    assert words[:3] == ["-u", user, "--"]
    assert words[-len(command) :] == command
    homes = {word.partition("=")[2] for word in words if "_HOME=" in word}
    assert homes == {
        directives("trainer")["Environment"][0].partition("SITE_HOME=")[2],
        directives("coordinator")["Environment"][0].partition("COORDINATOR_HOME=")[2],
    }


# --- firewall ------------------------------------------------------------------------------------


def test_the_firewall_file_is_one_that_nft_loads(tmp_path: Path) -> None:
    nft, unshare = tool("nft"), tool("unshare")
    rules = (DEPLOY / "firewall" / "site.nft").read_text()
    # These users exist here; the hospital's own come with its installation.
    rules = rules.replace("hospitium-trainer", "daemon").replace("hospitium-node", "nobody")
    file = tmp_path / "site.nft"
    file.write_text(rules)
    empty = run(unshare, "--map-root-user", "--net", nft, "list", "ruleset")
    if empty.returncode != 0:
        pytest.skip(f"nft does not run in a network namespace here: {empty.stderr[-200:]}")
    loaded = run(unshare, "--map-root-user", "--net", "sh", "-c", f"{nft} -f {file} && "
                 f"{nft} list ruleset")  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.count("reject") == 2


# --- proxy with client certificates --------------------------------------------------------------


@pytest.mark.parametrize("side", ["coordinator", "site"])
def test_the_proxy_files_are_strict_nginx_and_demand_certificates(side: str) -> None:
    crossplane = pytest.importorskip("crossplane", reason="crossplane is not installed here")
    parsed = crossplane.parse(
        str(DEPLOY / "nginx" / f"{side}.conf"), strict=True, check_ctx=True, check_args=True
    )
    assert (parsed["status"], parsed["errors"]) == ("ok", [])
    (stream,) = parsed["config"][0]["parsed"]
    (server,) = [one for one in stream["block"] if one["directive"] == "server"]
    found = {one["directive"]: one["args"] for one in server["block"]}
    demanded = {
        "coordinator": {"ssl_verify_client": ["on"], "ssl_protocols": ["TLSv1.3"]},
        "site": {"proxy_ssl_verify": ["on"], "proxy_ssl_protocols": ["TLSv1.3"]},
    }[side]
    assert demanded.items() <= found.items()
    if side == "site":
        assert found["listen"] == ["127.0.0.1:9092"]


# --- sample settings -----------------------------------------------------------------------------


def dotted(table: dict, prefix: str = "") -> set[str]:
    """Return the names of all keys of a TOML document."""
    return {
        name
        for key, value in table.items()
        for name in (
            dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value
            else {f"{prefix}{key}"}
        )
    }  # fmt: skip


def test_the_sample_settings_are_those_that_the_programs_read_and_write(tmp_path: Path) -> None:
    sample = DEPLOY / "config"
    for name in ("site", "coordinator", "policy"):
        shutil.copy(sample / f"{name}.toml", tmp_path)
    site = SiteHome(tmp_path).settings()
    coordinator = CoordinatorHome(tmp_path).settings()
    written = {
        "site": site_text(site.name, site.title),
        "coordinator": coordinator_text(coordinator.name, coordinator.network.hosts, 9092, 9093),
        "policy": NEW_POLICY,
    }
    for name, text in written.items():
        ours = (sample / f"{name}.toml").read_text()
        there, wanted = dotted(tomllib.loads(ours)), dotted(tomllib.loads(text))
        assert there == wanted, f"deploy/config/{name}.toml: a new key goes there too"
    rules = read_toml(SitePolicy, tmp_path / "policy.toml", what="a policy", remedy="")
    # The sample is as strict as the defaults.
    assert rules == SitePolicy()
    assert site.coordinator.address == coordinator.network.addresses[0]
    assert site.data.default == directives("trainer")["ReadOnlyPaths"][0]


# --- runbook -------------------------------------------------------------------------------------


def commands_in(text: str) -> list[list[str]]:
    """Return every `hospitium …` command of a page as words, comments left out."""
    blocks = text.split("```sh")[1:]
    lines = [line for block in blocks for line in block.split("```")[0].splitlines()]
    lines += [part for part in text.split("`") if part.startswith("hospitium ")]
    return [
        shlex.split(line[line.index("hospitium ") :], comments=True)[1:]
        for line in lines
        if line.startswith("hospitium ")
    ]


def test_every_command_of_the_runbook_exists_with_its_options() -> None:
    known = typer.main.get_command(_application([]))
    found = commands_in((DEPLOY / "RUNBOOK.md").read_text())
    assert len(found) > 20
    for words in found:
        command: click.Command = known
        rest = list(words)
        while isinstance(command, click.Group):
            assert rest, f"hospitium {' '.join(words)}: expected a command"
            assert rest[0] in command.commands, f"hospitium {' '.join(words)}: no such command"
            command = command.commands[rest.pop(0)]
        options = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
        for word in rest:
            assert not word.startswith("-") or word in options, f"hospitium {' '.join(words)}"


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_and_images_start_commands_that_exist(unit: str) -> None:
    started = directives(unit)["ExecStart"][0].split()[1:]
    image = stages((DEPLOY / "Dockerfile").read_text())[unit]
    (default,) = [json.loads(rest) for word, rest in image if word == "CMD"]
    (check,) = [json.loads(rest.partition("CMD ")[2]) for w, rest in image if w == "HEALTHCHECK"]
    composed = services(
        "compose.coordinator.yaml" if unit == "coordinator" else "compose.site.yaml"
    )[unit].get("command", [])
    checked = check[1:] if check[0] == "hospitium" else []
    for words in (started, default, checked, composed):
        command: click.Command = typer.main.get_command(_application([]))
        rest = list(words)
        while rest and isinstance(command, click.Group):
            assert rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        options = {name for one in command.params for name in one.opts}
        assert {word for word in rest if word.startswith("-")} <= options, words
