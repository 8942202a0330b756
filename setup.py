"The package as settings.ini describes it; the one file that nbdev and pip both read."
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def requirements(key: str) -> list[str]:
    "The requirements under `key`, one a line; `packaging` refuses a line it cannot read."
    return [str(Requirement(line)) for line in cfg[key].split("\n") if line.strip()]


readme = here / "README.md"
setup(
    name=cfg["lib_name"],
    version=str(Version(cfg["version"])),
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    install_requires=requirements("requirements"),
    extras_require={"dev": requirements("dev_requirements")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    # The folder data/ of the checkout travels as mae_repro/data of the wheel: parity vectors and small weights.
    packages=find_packages(include=["mae_repro", "mae_repro.*"]) + ["mae_repro.data"],
    package_dir={"mae_repro.data": "data"},
    package_data={"mae_repro.data": ["*.md", "parity/*", "parity/**/*", "pretrained/*", "pretrained/**/*", "reference/*", "results/*"]},
    zip_safe=False,
)
