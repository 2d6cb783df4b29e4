"""Checks a wheel and an sdist as a person meets them, in an empty environment and outside of the repository.

    python tests/installed/check.py dist

checks what is in the two files, installs the wheel without extras and runs a program of one's own; installs the extra
`all` and runs the README's lines and the command line; and takes out the packages of each extra in turn, and reads the
message. The environment is a new folder in the system's folder for temporary files, of 7 GB with PyTorch for CUDA.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
IN_SDIST = ("tests/test_imports.py", "docs/index.md", "README.md", "CHANGELOG.md", "LICENSE")
NOT_IN_FILES = re.compile(
    r"(^|/)(runs|\.venv[^/]*|__pycache__|\.\w+_cache|_build|generated|story|\.git)/|\.pyc$|\.ckpt$"
)
# The packages that are taken out, and the calls that then name the extra.
EXTRAS = {
    "tensorboard": (["tensorboard"], ["tensorboard"]),
    "arviz": (["arviz", "xarray"], ["arviz", "pyro-vae evaluate runs/digits"]),
    "data": (["scikit-learn", "torchvision"], ["digits", "mnist", "pyro-vae train digits --out new"]),
    "plots": (["matplotlib"], ["plots", "pyro-vae sample runs/digits"]),
    "cli": (["typer"], ["pyro-vae --help"]),
}


def check_files(wheel: Path, sdist: Path) -> None:
    """Look at the names of the files, and at the links of the page that the index shows."""
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in inside if name.endswith(".dist-info/METADATA")]
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[-1] for name in archive.getnames()]
    package = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "pyro_vae").rglob("*.py*") if path.suffix != ".pyc"
    }
    expected = package | {"pyro_vae_command.py"}
    found = {name for name in inside if ".dist-info/" not in name}
    assert found == expected | {"pyro_vae/py.typed"}, found ^ expected
    assert expected <= {*names}, expected - {*names}
    assert {*IN_SDIST} <= {*names}, {*IN_SDIST} - {*names}
    wrong = [name for name in [*names, *inside] if NOT_IN_FILES.search(name)]
    assert not wrong, wrong
    relative = re.findall(r"\]\((?!https?://|#)[^)]*\)", metadata)
    assert not relative, f"links that lead nowhere on the index's page: {relative}"


def main(folder: Path) -> None:
    """Check the files in a folder, and what they install."""
    (wheel,), (sdist,) = folder.resolve().glob("*.whl"), folder.resolve().glob("*.tar.gz")
    check_files(wheel, sdist)
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[0]
    with tempfile.TemporaryDirectory() as temporary:
        environment, place = Path(temporary, "environment"), Path(temporary, "elsewhere")
        place.mkdir()
        venv.create(environment, with_pip=True)
        programs = environment / ("Scripts" if os.name == "nt" else "bin")
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

        def run(*command: str, status: int = 0) -> str:
            print("$", *command, flush=True)
            program = str(programs / command[0])
            done = subprocess.run([program, *command[1:]], cwd=place, env=variables, capture_output=True, text=True)
            said = (done.stdout + done.stderr).strip()
            print(said[-2000:], flush=True)
            assert done.returncode == status, done.returncode
            return said

        run("pip", "install", "--quiet", str(wheel))
        run("python", str(HERE / "core.py"))
        for extra, (_, calls) in EXTRAS.items():
            for call in calls:
                words = call.split() if extra == "cli" else ["python", str(HERE / "missing.py"), call]
                if extra == "cli" or not call.startswith("pyro-vae"):  # without Typer, each command names the extra cli
                    check_message(run(*words, status=2 if extra == "cli" else 0), extra)

        run("pip", "install", "--quiet", f"{wheel}[all]")
        run("python", str(HERE / "core.py"))
        (place / "readme.py").write_text(readme, encoding="utf-8")
        run("python", "readme.py")
        assert (place / "bounds.png").stat().st_size > 2000
        run("pyro-vae", "train", "digits", "--epochs", "2")
        run("pyro-vae", "compare", "runs/digits", "--num-images", "50", "--repeats", "2")

        for extra, (packages, calls) in EXTRAS.items():
            run("pip", "uninstall", "--quiet", "--yes", *packages)
            for call in calls:
                command = call.startswith("pyro-vae")
                words = call.split() if command else ["python", str(HERE / "missing.py"), call]
                check_message(run(*words, status=2 if command else 0), extra)
    print("all checks passed")


def check_message(said: str, extra: str) -> None:
    """A line that says what was expected, and the command that installs it."""
    install = re.escape(f'pip install "pyro_vae[{extra}]".')
    message = rf"(error: )?expected the package \w+, which .+ needs, got none\. Install it: {install}"
    assert re.fullmatch(message, said), said


if __name__ == "__main__":
    main(Path(sys.argv[1]))
