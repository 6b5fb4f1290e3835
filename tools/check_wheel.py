"""Check the wheel in a directory: install it alone into an empty virtual environment and run its commands there.

The dependencies are not installed again (torch alone takes gigabytes): they are read from the environment that runs
this script, which must have them. The package itself can come only from the wheel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

RECIPE = """\
new: {family: llama, width: 32, depth: 2, context: 64}
calibration: {texts: texts.txt, samples: 2, length: 32}
measure: {texts: texts.txt, samples: 2, length: 32}
steps:
  - magnitude: {sparsity: 0.5}
"""


def check(wheel: Path, directory: Path) -> None:
    """Install `wheel` into a new environment in `directory` and run the commands; raises if one of them fails."""
    venv.create(directory / "venv", with_pip=True)
    python = directory / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A plain path entry: .pth files inside it, such as that of an editable install, have no effect.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    location = run(python, "-c", "import intaglio; print(intaglio.__file__)").strip()
    if not Path(location).is_relative_to(packages):
        raise SystemExit(f"intaglio is imported from {location}, not from the wheel in {packages}")

    intaglio = python.with_name("intaglio")
    for arguments in (["--help"], ["list"], ["show", "wanda"], ["schema"]):
        if not run(intaglio, *arguments).strip():
            raise SystemExit(f"intaglio {' '.join(arguments)} prints nothing")
        print(f"intaglio {' '.join(arguments)}: ok")
    lines = [f"Sentence {number} of a document that is long enough to be cut into segments." for number in range(4000)]
    (directory / "texts.txt").write_text("\n\n".join(lines), encoding="utf-8")
    (directory / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    run(intaglio, "carve", "--recipe", "recipe.yaml", "-o", "out")
    for name in ("model.safetensors", "report.html", "report.json", "intaglio.json"):
        if not (directory / "out" / name).is_file():
            raise SystemExit(f"intaglio carve wrote no {name}")
    print("intaglio carve: ok")


def main() -> None:
    """Check the newest wheel in the directory given on the command line."""
    wheels = sorted(Path(sys.argv[1]).glob("intaglio-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise SystemExit(f"no intaglio wheel in {sys.argv[1]}; build it with `make wheel`")
    with tempfile.TemporaryDirectory() as directory:
        check(wheels[-1].resolve(), Path(directory))
    print(f"{wheels[-1].name} works in an empty environment")


if __name__ == "__main__":
    main()
