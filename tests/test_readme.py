"""What the README tells people to type is run here."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from hospitium_simulations.synthetic_imaging import write_films

ROOT = Path(__file__).parents[1]


def commands(section: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    block = re.search(rf"## {section}\n.*?```console\n(.*?)```", text, re.DOTALL)
    return block.group(1).splitlines()


def run(command: str, directory: Path) -> None:
    program, *rest = shlex.split(command.split("  #")[0])
    executable = str(Path(sys.executable).parent / program)
    done = subprocess.run([executable, *rest], cwd=directory, capture_output=True, check=False)
    assert done.returncode == 0, (command, done.stderr.decode())


def test_the_commands_of_researcher_coordinator_and_hospital_work_in_this_order(tmp_path):
    """DATA and RUN, the README's placeholders, mean something in this directory."""
    write_films(tmp_path / "DATA", sites=5, patients_per_site=40, seed=1)
    new, check, simulate = commands("If you are a researcher")
    run(new, tmp_path)
    study = tmp_path / "my-study.toml"
    quick = study.read_text().replace("rounds = 20 ", "rounds = 2  ")
    study.write_text(quick.replace("width = 32", "width = 4 "))
    run(check, tmp_path)
    run(simulate, tmp_path)
    made = next((tmp_path / "runs").glob("*/report.html"))
    assert "only site-1" in made.read_text()
    made.parent.rename(tmp_path / "RUN")
    for command in commands("If you are a coordinator") + commands("If you are a hospital"):
        run(command, tmp_path)


def test_the_set_up_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands("See it"):
        target = command.split()[1]
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_page_that_the_readme_names_is_there():
    for page in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / page).exists(), page
