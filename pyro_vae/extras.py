"""Packages that an installation may lack: the extra that installs each, and the error where one is missing."""

from importlib.util import find_spec

from pyro_vae.errors import MissingPackageError

#: By the name that Python imports, the extra of this package that installs it.
EXTRA_OF = {
    "arviz": "arviz",
    "h5netcdf": "arviz",
    "matplotlib": "plots",
    "rich": "cli",
    "sklearn": "data",
    "tensorboard": "tensorboard",
    "torchvision": "data",
    "typer": "cli",
    "xarray": "arviz",
}


def require(*packages: str, by: str) -> None:
    """Raise MissingPackageError unless these packages are installed; `by` is what needs them.

    It is called before any work that would be lost. Nothing is imported.
    """
    for package in packages:
        spec = find_spec(package)
        if spec is None or spec.origin is None:  # a folder of that name, such as one of logs, has no origin
            raise MissingPackageError(
                f"expected the package {package}, which {by} needs, got none. Install it: pip install "
                f'"pyro_vae[{EXTRA_OF[package]}]".'
            )
