"""What the README tells people to type is run here, in the order in which they would."""

import re
import shlex
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from hospitium_simulations.local_federation import free_ports
from hospitium_simulations.synthetic_imaging import write_films

ROOT = Path(__file__).parents[1]
HOSPITALS = {"St. Anna": "st-anna", "Riverside": "riverside", "Nord": "nord"}
ARRIVAL_S = 60


def commands(section: str) -> list[str]:
    """Every command of a section, without its explanation."""
    text = (ROOT / "README.md").read_text()
    part = text.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for block in re.findall(r"```console\n(.*?)```", part, re.DOTALL)
             for line in block.splitlines()]  # fmt: skip
    return [line.split("  #")[0].strip() for line in lines]


def words(command: str) -> list[str]:
    program, *rest = shlex.split(command)
    return [str(Path(sys.executable).parent / program), *rest]


def run(command: str, directory: Path) -> str:
    """People are asked whether fingerprints agree: they do."""
    done = subprocess.run(
        words(command), cwd=directory, input="y\n" * 5, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def start(command: str, directory: Path, running: ExitStack) -> None:
    with (directory / "processes.log").open("ab") as log:
        process = subprocess.Popen(words(command), cwd=directory, stdout=log, stderr=log)
    running.callback(process.wait)
    running.callback(process.terminate)


def test_the_commands_of_a_researcher_work_in_this_order(tmp_path):
    """DATA, the README's placeholder, means something in this directory."""
    write_films(tmp_path / "DATA", sites=5, patients_per_site=40, seed=1)
    new, check, simulate = commands("If you are a researcher")
    run(new, tmp_path)
    shorten(tmp_path / "my-study.toml")
    run(check, tmp_path)
    run(simulate, tmp_path)
    made = next((tmp_path / "runs").glob("*/report.html"))
    assert "only site-1" in made.read_text()


def test_three_hospitals_and_a_coordinator_get_from_nothing_to_a_report(tmp_path):
    """Each hospital in its own folder; the coordinator between them carries the two files."""
    init, enroll, serve, submit, watch, report = commands("If you are a coordinator")
    site_init, admit, preflight, site_run, *owner = commands("If you are a hospital")
    studies, review, approve, ledger = owner
    office = tmp_path / "office"
    office.mkdir()
    port, local_port = free_ports(2)
    init = init.replace("fl.example.org", "127.0.0.1")
    run(f"{init} --port {port} --local-port {local_port}", office)
    for number, (title, name) in enumerate(HOSPITALS.items()):
        home = tmp_path / name
        home.mkdir()
        run(site_init.replace("St. Anna", title), home)
        (home / f"{name}.request.json").rename(office / f"{name}.request.json")
        run(enroll.replace("st-anna", name), office)
        (office / f"{name}.admission.json").rename(home / f"{name}.admission.json")
        run(admit.replace("st-anna", name), home)
        allow_three(home / "site" / "policy.toml")
        write_films(home / "DATA", sites=1, patients_per_site=60, seed=number)
    with ExitStack() as running:
        start(serve, office, running)
        wait_for_port(port)
        for name in HOSPITALS.values():
            assert "error" not in run(preflight, tmp_path / name)
            start(site_run, tmp_path / name, running)
        run("hospitium study new my-study.toml --task image_classification", office)
        shorten(office / "my-study.toml")
        run(submit, office)
        for name in HOSPITALS.values():
            home = tmp_path / name
            wait_until(lambda home=home: "my-study" in run(studies, home))
            assert "my-study" in run(review, home)
            run(approve, home)
        run(watch, office)
        run(report, office)
        assert "training" in run(ledger, tmp_path / "st-anna")
    page = office / "coordinator" / "studies" / "my-study" / "report.html"
    assert "How did it get there?" in page.read_text()


def shorten(study: Path) -> None:
    """Two rounds of a tiny model, for three hospitals."""
    text = study.read_text()
    for key, short in (("rounds", 2), ("width", 4), ("minimum_sites", 3)):
        text, found = re.subn(rf"(?m)^{key} = \d+", f"{key} = {short}", text)
        assert found == 1, key
    study.write_text(re.sub(r'(?m)^id = ".*?"', 'id = "my-study"', text))


def allow_three(policy: Path) -> None:
    rules = policy.read_text()
    assert "minimum_sites = 5" in rules
    policy.write_text(rules.replace("minimum_sites = 5", "minimum_sites = 3"))


def wait_for_port(port: int) -> None:
    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(answers)


def wait_until(condition) -> None:
    until = time.monotonic() + ARRIVAL_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.3)


def test_the_set_up_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands("See it"):
        target = command.split()[1]
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_page_that_the_readme_names_is_there():
    for page in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / page).exists(), page
